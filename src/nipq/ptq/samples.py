"""Calibration samples: read once from a loader, checked, and split into a part to fit and a part to judge by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nipq.errors import ConfigError, NonFiniteError
from nipq.prepare.batches import BatchReader
from nipq.prepare.input_form import ExampleInputs, cut, tensors_in

#: Samples in a batch of the measurements; larger batches of the loader are cut, smaller ones stay.
BATCH = 32

#: Every so many samples one is held out: the last ones, which neither calibration nor allocation see.
HELD_OUT = 4

#: Inputs of the model, and targets if they are wanted, else None.
Batch = tuple[ExampleInputs, Any]


@dataclass(frozen=True)
class Samples:
    """Batches for measurements, as pairs of inputs and targets.

    Attributes:
        fit: batches that ranges, bits and statistics are measured with.
        held_out: batches that stages are judged by.
        fit_count: samples in ``fit``.
        held_out_count: samples in ``held_out``.
    """

    fit: list[Batch]
    held_out: list[Batch]
    fit_count: int
    held_out_count: int


def read_samples(loader: Iterable[Any], count: int, reader: BatchReader, *, targets: bool = False) -> Samples:
    """Read the first samples of a loader; the last quarter of them is held out.

    Args:
        loader: batches; read until there are ``count`` samples.
        count: how many samples, at least 2.
        reader: finds inputs and targets in a batch.
        targets: whether targets are wanted.

    Returns:
        The samples in batches of :data:`BATCH` at most.

    Raises:
        ConfigError: if there are fewer than 2 samples, all of them are equal, or a batch is not what the model takes.
        NonFiniteError: if a sample holds NaN or infinity.
    """
    if count < 2:
        raise ConfigError(f"quantize: expected samples of at least 2, found {count}. A few hundred do.")
    batches: list[tuple[Batch, int]] = []
    read = 0
    for where, raw in reader.read(loader):
        whole: Batch = reader.inputs(raw, where), reader.targets(raw, where) if targets else None
        _check_finite(whole, where)
        taken = min(reader.samples(whole[0]), count - read)
        batches += [
            (part(whole, start, min(start + BATCH, taken), reader), min(start + BATCH, taken) - start)
            for start in range(0, taken, BATCH)
        ]
        read += taken
        if read >= count:
            break
    if read < 2:
        raise ConfigError(
            f"quantize: expected at least 2 samples in the loader, found {read}. "
            "Give a few hundred, unlabelled ones do."
        )
    _check_differ([batch for batch, _ in batches])
    fit, held_out, left = [], [], read - max(1, read // HELD_OUT)
    fit_count = left
    for batch, size in batches:
        if left > 0:
            fit.append(batch if size <= left else part(batch, 0, left, reader))
        if size > left:
            held_out.append(batch if left <= 0 else part(batch, left, size, reader))
        left -= min(size, left)
    return Samples(fit, held_out, fit_count, read - fit_count)


def part(batch: Batch, start: int, stop: int, reader: BatchReader) -> Batch:
    """Some samples of a batch; what belongs to all of its samples stays whole.

    Args:
        batch: inputs and targets.
        start: the first sample.
        stop: the one after the last.
        reader: knows which inputs have one entry for each sample.
    """
    inputs, targets = batch
    return reader.cut(inputs, start, stop), cut(targets, start, stop, reader.samples(inputs))


def _check_finite(batch: Batch, where: str) -> None:
    for tensor in tensors_in(batch[0]):
        if bool(tensor.isnan().any()) or bool(tensor.isposinf().any()):  # a mask may hold minus infinity
            raise NonFiniteError(
                f"{where}: expected finite samples, found NaN or infinity among them. Look at the loader."
            )


def _check_differ(batches: list[Batch]) -> None:
    """Refuse samples that are all equal."""
    first, differ = None, False
    for inputs, _ in batches:
        tensors = list(tensors_in(inputs))
        first = [tensor[:1] if tensor.ndim else tensor for tensor in tensors] if first is None else first
        differ = differ or any(
            a.shape[1:] != b.shape[1:] or not torch.equal(a.expand_as(b), b)
            for a, b in zip(first, tensors, strict=False)
            if b.ndim
        )
    if not differ:
        raise ConfigError(
            "quantize: expected samples that differ, found that all are equal. Give a few hundred real samples."
        )
