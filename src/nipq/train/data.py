"""Data sets by name: digits, Fashion-MNIST, image folders in ImageNet's layout, and custom ones."""

from __future__ import annotations

import copy
import gzip
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nipq.errors import ConfigError, require
from nipq.functional.counter_rng import seed_of
from nipq.train.batches import Batch, Sources, Split, slice_of, stratified, tensor_splits
from nipq.train.factory import import_callable

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

FASHION_HELP = (
    "give the folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (plain or .gz, in any subfolder). They come with the Debian package dataset-fashion-mnist, "
    "or from torchvision.datasets.FashionMNIST(root, download=True)"
)
FOLDER_HELP = (
    "the layout is PATH/train/<class>/<image> and PATH/val/<class>/<image>; name it with data.path or --data PATH"
)
#: ImageNet's channel means and deviations, which torchvision's weights were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Shorter side before the evaluation crop, relative to the crop.
RESIZE_RATIO = 256 / 224


def load_data(config: DataConfig, seed: int) -> Sources:
    """Load the splits of the data set that a config names.

    Args:
        config: the ``data`` section.
        seed: decides about the training samples that are held out for validation.

    Returns:
        The splits for training, validation and test.

    Raises:
        ConfigError: if the folder or a file is missing or not what it should be.
        MissingDependencyError: if the data set's package is not installed.
    """
    if config.kind == "digits":
        return _digits(config, seed)
    if config.kind == "fashion_mnist":
        return _fashion_mnist(config, seed)
    if config.kind == "image_folder":
        return _image_folder(config, seed)
    assert config.factory is not None
    found = import_callable(config.factory, "data.factory")(config, seed)
    if not isinstance(found, Sources):
        raise ConfigError(f"data.factory {config.factory!r} must return Sources, it gave {type(found).__name__}")
    return found


def _digits(config: DataConfig, seed: int) -> Sources:
    """The 1,797 gray 8x8 digits inside scikit-learn; a fixed, stratified fifth of them is the test split."""
    datasets = require("sklearn.datasets", extra="vision", purpose="the digits data")
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target, dtype=torch.int64)
    test = stratified(labels, 0.2, seed=0)
    return _standardised(images[~test], labels[~test], images[test], labels[test], config, seed, shift=1, flip=False)


def _fashion_mnist(config: DataConfig, seed: int) -> Sources:
    """60,000 + 10,000 gray 28x28 images from a folder of idx files, searched with its subfolders."""
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


def _idx(root: Path, stem: str) -> Tensor:
    """One idx file: 4 bytes of magic (the last counts the axes), the big-endian sizes, then the bytes.

    (torchvision's reader takes neither .gz files nor another layout of folders than its own.)
    """
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
    """Splits standardised with the training images' mean and deviation."""
    mean, deviation = images.mean(), images.std()
    train, test = ((images - mean) / deviation, labels), ((test_images - mean) / deviation, test_labels)
    return tensor_splits(train, test, config, seed, shift=shift, flip=flip, classes=int(labels.max()) + 1)


# ---------------------------------------------------------------------- image folders


def _image_folder(config: DataConfig, seed: int) -> Sources:
    """Images from ``path/train`` and ``path/val``; ``val`` is the test split, validation is cut from ``train``."""
    if config.path is None:
        raise ConfigError(f"expected data.path for image_folder, found none; {FOLDER_HELP}")
    train, test = (_open(Path(config.path) / name) for name in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(f"expected the same classes in train and val, found {odd[:5]} in one only; {FOLDER_HELP}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(config.validation * len(order))) if config.validation else 0
    if held_out >= len(order):
        raise ConfigError(f"expected more than {held_out} training images, found {len(order)}; add images")
    kept = order[held_out:][: config.train_limit]
    return Sources(
        train=FolderSplit(train, kept, config),
        validation=FolderSplit(train, sorted(order[:held_out]), config) if held_out else None,
        test=FolderSplit(test, list(range(len(test))), config),
        classes=len(train.classes),
    )


class FolderSplit(Split):
    """Some images of a folder, decoded when they are needed.

    Args:
        folder: torchvision's ``ImageFolder`` without a transform.
        indices: the images of this split.
        config: the ``data`` section.
    """

    def __init__(self, folder: Any, indices: list[int], config: DataConfig) -> None:  # noqa: ANN401 - untyped library
        """Build the transforms; no image is read."""
        self.folder = folder
        self.indices = indices
        self.config = config
        self.batch_size = min(config.batch_size, len(indices))
        self.shared = (0, 1)
        self._training, self._evaluation = _transforms(config)

    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches in the folder's order."""
        size = self.config.eval_batch_size
        batches = [self.indices[first : first + size] for first in range(0, len(self.indices), size)]
        return self._load(batches, self._evaluation, 0)

    def __len__(self) -> int:
        """Number of training batches in an epoch."""
        return len(self.indices) // self.batch_size

    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled and augmented batches."""
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(key)).tolist()
        size, own = self.batch_size, slice_of(self.batch_size, *self.shared)
        batches = [
            [self.indices[place] for place in order[i * size : (i + 1) * size][own]] for i in range(start, len(self))
        ]
        return self._load(batches, self._training if self.config.augment else self._evaluation, key)

    def part(self, index: int, parts: int) -> Split:
        """The same split, decoding a slice of every training batch only."""
        found = copy.copy(self)
        found.shared = (index, parts)
        return found

    def _load(self, batches: list[list[int]], transform: Any, key: int) -> Iterator[Batch]:  # noqa: ANN401
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.folder, transform, key),
            batch_sampler=batches,
            num_workers=min(self.config.workers, os.cpu_count() or 1),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(key),
        )
        return iter(loader)


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """Transforms each image under a seed of its own, so the result depends on neither workers nor order."""

    folder: Any
    transform: Any
    key: int

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.key, index))
            return self.transform(image), label


def _open(path: Path) -> Any:  # noqa: ANN401 - untyped library
    datasets = require("torchvision.datasets", extra="vision", purpose="image folders")
    if not path.is_dir():
        raise ConfigError(f"expected a folder of class folders, found nothing at {path}; {FOLDER_HELP}")
    try:
        return datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"expected images in class folders under {path}, found: {error}; {FOLDER_HELP}") from error


def _transforms(config: DataConfig) -> tuple[Any, Any]:
    transforms = require("torchvision.transforms", extra="vision", purpose="image folders")
    how = transforms.InterpolationMode(config.interpolation)
    size = config.image_size
    ending = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    training = [transforms.RandomResizedCrop(size, interpolation=how), transforms.RandomHorizontalFlip()]
    evaluation = [transforms.Resize(round(size * RESIZE_RATIO), interpolation=how), transforms.CenterCrop(size)]
    return transforms.Compose(training + ending), transforms.Compose(evaluation + ending)
