"""Image folders in the usual ImageNet layout, with ImageNet's usual transforms."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from nipq.errors import ConfigError, require
from nipq.train.batches import Batch, Sources, Split, slice_of
from nipq.train.seeds import seed_of

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, which torchvision's weights were trained with."""
RESIZE_RATIO = 256 / 224
"""Shorter side before the evaluation crop, relative to the crop."""
LAYOUT = "the layout is PATH/train/<class>/<image> and PATH/val/<class>/<image>; name it with data.path or --data PATH"


def image_folder(config: DataConfig, seed: int) -> Sources:
    """Images from ``path/train`` and ``path/val``; ``val`` is the test split, validation is cut from ``train``.

    Args:
        config: The ``data`` section.
        seed: Decides which training images are held out for validation.

    Returns:
        The splits.

    Raises:
        ConfigError: If a folder is missing, holds no images, or the two folders disagree on the classes.
    """
    if config.path is None:
        raise ConfigError(f"expected data.path for image_folder, found none; {LAYOUT}")
    train, test = (_open(Path(config.path) / name) for name in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(f"expected the same classes in train and val, found {odd[:5]} in one only; {LAYOUT}")
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
        indices: The images of this split.
        config: The ``data`` section.
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

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.folder[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.key, index))
            return self.transform(image), label


def _open(path: Path) -> Any:  # noqa: ANN401 - untyped library
    datasets = require("torchvision.datasets", extra="vision", purpose="image folders")
    if not path.is_dir():
        raise ConfigError(f"expected a folder of class folders, found nothing at {path}; {LAYOUT}")
    try:
        return datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"expected images in class folders under {path}, found: {error}; {LAYOUT}") from error


def _transforms(config: DataConfig) -> tuple[Any, Any]:
    transforms = require("torchvision.transforms", extra="vision", purpose="image folders")
    how = transforms.InterpolationMode(config.interpolation)
    size = config.image_size
    ending = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    training = [transforms.RandomResizedCrop(size, interpolation=how), transforms.RandomHorizontalFlip()]
    evaluation = [transforms.Resize(round(size * RESIZE_RATIO), interpolation=how), transforms.CenterCrop(size)]
    return transforms.Compose(training + ending), transforms.Compose(evaluation + ending)
