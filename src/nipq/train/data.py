"""The data sets that a config can name."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nipq.errors import ConfigError, require
from nipq.train.batches import Sources, TensorSplit
from nipq.train.image_folder import image_folder

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

FASHION_HELP = (
    "give the folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (plain or .gz, in any subfolder). They come with the Debian package dataset-fashion-mnist, "
    "or from torchvision.datasets.FashionMNIST(root, download=True)"
)


def load_data(config: DataConfig, seed: int) -> Sources:
    """The splits that a config names.

    Args:
        config: The ``data`` section.
        seed: Decides which training images are held out for validation.

    Returns:
        Train, validation and test splits.

    Raises:
        ConfigError: If the folder or a file is missing or not what it should be.
        MissingDependencyError: If the data set's package is not installed.
    """
    if config.kind == "digits":
        return digits(config, seed)
    if config.kind == "fashion_mnist":
        return fashion_mnist(config, seed)
    return image_folder(config, seed)


def digits(config: DataConfig, seed: int) -> Sources:
    """The 1,797 gray 8x8 digits inside scikit-learn; a fixed, stratified fifth of them is the test split.

    Args:
        config: The ``data`` section.
        seed: Decides which training images are held out for validation.

    Returns:
        The splits, standardised with the training images' mean and deviation.
    """
    datasets = require("sklearn.datasets", extra="vision", purpose="the digits data")
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target, dtype=torch.int64)
    test = _stratified(labels, 0.2, seed=0)
    return _in_memory(images[~test], labels[~test], images[test], labels[test], config, seed, shift=1, flip=False)


def fashion_mnist(config: DataConfig, seed: int) -> Sources:
    """Fashion-MNIST, 60,000 + 10,000 gray 28x28 images, from a folder of idx files.

    Args:
        config: The ``data`` section; ``path`` is searched with its subfolders.
        seed: Decides which training images are held out for validation.

    Returns:
        The splits, standardised with the training images' mean and deviation.

    Raises:
        ConfigError: If the folder or one of the four files is missing or damaged.
    """
    if config.path is None:
        raise ConfigError(f"expected data.path for fashion_mnist, found none; {FASHION_HELP}")
    root = Path(config.path)
    if not root.is_dir():
        raise ConfigError(f"expected a folder at data.path, found nothing at {root}; {FASHION_HELP}")
    parts = [_idx(root, f"{stem}-{kind}") for stem in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    images, labels, test_images, test_labels = parts
    return _in_memory(
        images.float()[:, None], labels.long(), test_images.float()[:, None], test_labels.long(), config, seed,
        shift=2, flip=True,
    )  # fmt: skip


def _idx(root: Path, stem: str) -> Tensor:
    """One idx file: 4 bytes of magic (the last counts the axes), the big-endian sizes, then the bytes."""
    found = sorted(path for path in root.rglob(f"{stem}-ubyte*") if path.name in (f"{stem}-ubyte", f"{stem}-ubyte.gz"))
    if not found:
        raise ConfigError(f"expected a file {stem}-ubyte or {stem}-ubyte.gz under {root}, found none; {FASHION_HELP}")
    path = found[0]
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = raw[3]
        shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=axes, offset=4))
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
        if raw[:3] != b"\0\0\x08" or len(values) != math.prod(shape):
            raise ValueError("the header does not fit the content")
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ConfigError(f"expected an idx file of bytes, found {path}: {error}; get the file again") from error
    return torch.from_numpy(values.reshape(shape).copy())


def _stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A mask that takes the given fraction of every class, rounded up."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        count = math.ceil(fraction * len(members))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def _in_memory(
    images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, config: DataConfig, seed: int,
    *, shift: int, flip: bool,
) -> Sources:  # fmt: skip
    mean, deviation = images.mean(), images.std()
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    held_out = _stratified(labels, config.validation, seed)
    train = (~held_out).nonzero()[:, 0]
    if config.train_limit is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]

    def split(x: Tensor, y: Tensor) -> TensorSplit:
        return TensorSplit(
            x, y, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size,
            shift=shift if config.augment else 0, flip=flip and config.augment,
        )  # fmt: skip

    return Sources(
        train=split(images[train], labels[train]),
        validation=split(images[held_out], labels[held_out]) if held_out.any() else None,
        test=split(test_images, test_labels),
        classes=int(labels.max()) + 1,
    )
