"""Batches of inputs and targets: in a fixed order for evaluation, in a seeded order for training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.functional.counter_rng import seed_of

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

#: Inputs of a model, or targets of a task; the first axis of every tensor counts samples.
Nested = Tensor | Mapping[str, Tensor]
#: Inputs and targets; targets may be ``None``.
Batch = tuple[Any, Any]
#: Inputs of a training batch and a generator -> inputs to train with.
Augment = Callable[[Any, torch.Generator], Any]


# ---------------------------------------------------------------------- tensors and mappings of tensors


def count_of(value: Nested) -> int:
    """Number of samples.

    Example:
        >>> count_of({"ids": torch.zeros(3, 5), "mask": torch.zeros(3, 5)})
        3
    """
    return len(value) if isinstance(value, Tensor) else len(next(iter(value.values())))


def pick(value: Any, samples: slice | Tensor) -> Any:  # noqa: ANN401 - the same form as it came in
    """Some of the samples, by a slice or by indices."""
    if isinstance(value, Mapping):
        return {key: tensor[samples] for key, tensor in value.items()}
    return None if value is None else value[samples]


def moved(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:  # noqa: ANN401
    """Copy to another device; with ``channels_last`` tensors of four axes (images) get that memory layout."""
    if isinstance(value, Mapping):
        return {key: moved(tensor, device, channels_last=channels_last) for key, tensor in value.items()}
    if value is None:
        return None
    layout = torch.channels_last if channels_last and value.ndim == 4 else torch.contiguous_format
    return value.to(device, memory_format=layout, non_blocking=True)


def slice_of(count: int, index: int, parts: int) -> slice:
    """The samples of slice ``index`` of ``parts`` equal ones of a batch; ConfigError if it cannot be divided.

    Example:
        >>> slice_of(6, 1, 2)
        slice(3, 6, None)
    """
    if count % parts:
        raise ConfigError(
            f"expected training batches that {parts} processes can share equally, found one of {count} samples; "
            f"choose a data.batch_size divisible by {parts} and no larger than the training data, or fewer processes"
        )
    size = count // parts
    return slice(index * size, (index + 1) * size)


# ---------------------------------------------------------------------- splits


class Split(ABC):
    """One split of a data set.

    Iterating gives every sample once, in order, unaugmented: for evaluation. :meth:`epoch` gives shuffled and augmented
    training batches that depend on their key only.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches: inputs and targets, e.g. images [N, C, H, W] float32 and labels [N] int64."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of training batches in an epoch."""

    @abstractmethod
    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Training batches of one epoch.

        Args:
            key: seed of order and augmentation.
            start: first batch to give; the batches from there on are the same as in a whole epoch.

        Returns:
            An iterator over inputs and targets.
        """

    def part(self, index: int, parts: int) -> Split:
        """Equal slices of every training batch, for one of several processes.

        Args:
            index: number of the process, from 0.
            parts: number of processes.

        Returns:
            The slices; evaluation batches stay whole. A split that can do so should not load the rest.
        """
        return Part(self, index, parts)


class Part(Split):
    """Slices of another split's training batches, in its order and with its augmentation.

    Args:
        split: the split.
        index: number of the slice, from 0.
        parts: number of slices.
    """

    def __init__(self, split: Split, index: int, parts: int) -> None:
        """Keep the split."""
        self.split = split
        self.index = index
        self.parts = parts

    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches, whole."""
        return iter(self.split)

    def __len__(self) -> int:
        """Number of training batches in an epoch."""
        return len(self.split)

    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """This slice of the training batches."""
        for inputs, targets in self.split.epoch(key, start):
            samples = slice_of(count_of(inputs), self.index, self.parts)
            yield pick(inputs, samples), pick(targets, samples)


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
    """The splits of a data set: ``train`` and ``validation`` are cut from the training data, ``test`` is apart.

    ``classes`` is their number where the data have classes, else ``None``.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: int | None = None


class TensorSplit(Split):
    """A split held in memory.

    Args:
        inputs: first axis N; images are [N, C, H, W] float32, standardised.
        targets: first axis N, e.g. labels [N] int64; ``None`` for data without any.
        batch_size: of training batches; a last smaller batch is dropped unless it is the only one.
        eval_batch_size: of evaluation batches.
        shift: augmentation: shift each training image by up to this many pixels, filling with the image minimum.
        flip: augmentation: mirror half of the training images.
        augment: augmentation of any other kind, after these: called with the inputs of a training batch and a generator
            for all that is random, it returns the inputs to train with.
    """

    def __init__(
        self,
        inputs: Nested,
        targets: Nested | None,
        *,
        batch_size: int,
        eval_batch_size: int,
        shift: int = 0,
        flip: bool = False,
        augment: Augment | None = None,
    ) -> None:
        """Keep the tensors; nothing is copied."""
        self.inputs = inputs
        self.targets = targets
        self.count = count_of(inputs)
        self.batch_size = min(batch_size, self.count)
        self.eval_batch_size = eval_batch_size
        self.shift = shift
        self.flip = flip
        self.augment = augment

    def __iter__(self) -> Iterator[Batch]:
        """Evaluation batches in the stored order."""
        for start in range(0, self.count, self.eval_batch_size):
            samples = slice(start, start + self.eval_batch_size)
            yield pick(self.inputs, samples), pick(self.targets, samples)

    def __len__(self) -> int:
        """Number of training batches in an epoch."""
        return self.count // self.batch_size

    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled and augmented batches."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(key))
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            generator = torch.Generator().manual_seed(seed_of(key, index))
            yield self._augmented(pick(self.inputs, chosen), generator), pick(self.targets, chosen)

    def _augmented(self, inputs: Any, generator: torch.Generator) -> Any:  # noqa: ANN401 - images for shift and flip
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=generator) < 0.5
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(-1), inputs)
        if self.shift:
            inputs = _shifted(inputs, self.shift, generator)
        return inputs if self.augment is None else self.augment(inputs, generator)


def tensor_splits(
    train: tuple[Nested, Nested | None],
    test: tuple[Nested, Nested | None],
    config: DataConfig,
    seed: int,
    *,
    shift: int = 0,
    flip: bool = False,
    augment: Augment | None = None,
    classes: int | None = None,
) -> Sources:
    """Splits held in memory, cut and batched as the ``data`` section says.

    Args:
        train: inputs and targets; a part becomes the validation split, stratified if the targets are whole numbers.
        test: inputs and targets of the test split.
        config: the ``data`` section; with ``augment: false`` there is no augmentation.
        seed: decides about the training samples that are held out, and those that are kept under ``train_limit``.
        shift: see :class:`TensorSplit`.
        flip: see there.
        augment: see there.
        classes: number of classes, where there are classes.

    Returns:
        The splits.
    """
    inputs, targets = train
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        held_out = stratified(targets, config.validation, seed)
    else:
        count = count_of(inputs)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held_out = torch.zeros(count, dtype=torch.bool)
        held_out[order[: math.ceil(config.validation * count)]] = True
    kept = (~held_out).nonzero()[:, 0]
    if config.train_limit is not None:
        kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]

    def split(x: Nested, y: Nested | None) -> TensorSplit:
        return TensorSplit(
            x, y, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size,
            shift=shift if config.augment else 0, flip=flip and config.augment,
            augment=augment if config.augment else None,
        )  # fmt: skip

    return Sources(
        train=split(pick(inputs, kept), pick(targets, kept)),
        validation=split(pick(inputs, held_out), pick(targets, held_out)) if held_out.any() else None,
        test=split(*test),
        classes=classes,
    )


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Mask, [N] bool, of a fraction in [0, 1] of every class of ``labels`` [N] int64, rounded up; seeded."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        count = math.ceil(fraction * len(members))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


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
