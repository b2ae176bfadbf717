"""Batches of images, in a fixed order for evaluation or in a seeded order for training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from nipq.train.seeds import seed_of

Batch = tuple[Tensor, Tensor]


class Split(ABC):
    """One split of a data set.

    Iterating gives every image once, in order, unaugmented: for evaluation. :meth:`epoch` gives shuffled and augmented
    training batches that depend on their key only.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches: images [N, C, H, W] float32 and labels [N] int64."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of training batches in an epoch."""

    @abstractmethod
    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Training batches of one epoch.

        Args:
            key: Seed of order and augmentation.
            start: First batch to give; the batches from there on are the same as in a whole epoch.

        Returns:
            An iterator over images and labels.
        """


@dataclass(frozen=True)
class Few:
    """The first ``count`` batches of a split: training batches under ``key``, or evaluation batches without one."""

    split: Split
    count: int
    key: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The batches, the same every time."""
        return islice(self.split if self.key is None else self.split.epoch(self.key), self.count)


@dataclass(frozen=True)
class Sources:
    """The splits of a data set: ``train`` and ``validation`` are cut from the training images, ``test`` is apart."""

    train: Split
    validation: Split | None
    test: Split
    classes: int


class TensorSplit(Split):
    """A split held in memory.

    Args:
        images: [N, C, H, W] float32, standardised.
        labels: [N] int64.
        batch_size: Of training batches; a last smaller batch is dropped unless it is the only one.
        eval_batch_size: Of evaluation batches.
        shift: Augmentation: shift each training image by up to this many pixels, filling with the image minimum.
        flip: Augmentation: mirror half of the training images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        eval_batch_size: int,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        """Keep the tensors; nothing is copied."""
        self.images = images
        self.labels = labels
        self.batch_size = min(batch_size, len(labels))
        self.eval_batch_size = eval_batch_size
        self.shift = shift
        self.flip = flip

    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches in the stored order."""
        return zip(
            torch.split(self.images, self.eval_batch_size), torch.split(self.labels, self.eval_batch_size), strict=True
        )

    def __len__(self) -> int:
        """Number of training batches in an epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled and augmented batches."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(key))
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            generator = torch.Generator().manual_seed(seed_of(key, index))
            yield self._augment(self.images[chosen], generator), self.labels[chosen]

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count = len(images)
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.shift:
            images = _shifted(images, self.shift, generator)
        return images


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by a whole number of pixels in [-most, most] in both directions."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most, most, most, most), value=float(images.min()))
    offsets = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.arange(width)
    image = torch.arange(count)[:, None, None]
    # Indices on both sides of the channel slice put the channels last.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
