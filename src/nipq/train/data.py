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
from nipq.train.batches import Sources, stratified, tensor_splits
from nipq.train.factory import import_callable
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
    if config.kind == "image_folder":
        return image_folder(config, seed)
    return custom(config, seed)


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
    test = stratified(labels, 0.2, seed=0)
    return _standardised(images[~test], labels[~test], images[test], labels[test], config, seed, shift=1, flip=False)


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
    return _standardised(
        images.float()[:, None], labels.long(), test_images.float()[:, None], test_labels.long(), config, seed,
        shift=2, flip=True,
    )  # fmt: skip


def custom(config: DataConfig, seed: int) -> Sources:
    """Whatever the callable at ``config.factory`` returns.

    Args:
        config: The ``data`` section, given to the callable with the seed.
        seed: Decides which training samples are held out for validation.

    Returns:
        The splits.

    Raises:
        ConfigError: If there is no such callable, or it returns something else.
    """
    assert config.factory is not None
    found = import_callable(config.factory, "data.factory")(config, seed)
    if not isinstance(found, Sources):
        raise ConfigError(f"data.factory {config.factory!r} must return Sources, it gave {type(found).__name__}")
    return found


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


def _standardised(
    images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, config: DataConfig, seed: int,
    *, shift: int, flip: bool,
) -> Sources:  # fmt: skip
    mean, deviation = images.mean(), images.std()
    train, test = ((images - mean) / deviation, labels), ((test_images - mean) / deviation, test_labels)
    return tensor_splits(train, test, config, seed, shift=shift, flip=flip, classes=int(labels.max()) + 1)
