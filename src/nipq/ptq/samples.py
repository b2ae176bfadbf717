"""Calibration samples: read once from a loader, checked, and split into a part to fit and a part to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nipq.errors import ConfigError, NonFiniteError
from nipq.prepare.batches import inputs_of, tensors_in

#: Samples in a batch of the measurements; larger batches of the loader are cut, smaller ones stay.
BATCH = 32

#: Every so many samples one is held out: the last ones, which neither calibration nor allocation see.
HELD_OUT = 4


@dataclass(frozen=True)
class Samples:
    """Batches for measurements.

    Attributes:
        fit: batches that ranges, bits and statistics are measured with.
        held_out: batches that stages are judged by.
        fit_count: samples in ``fit``.
        held_out_count: samples in ``held_out``.
    """

    fit: list[Any]
    held_out: list[Any]
    fit_count: int
    held_out_count: int


def read_samples(loader: Iterable[Any], count: int) -> Samples:
    """Read the first samples of a loader; the last quarter of them is held out.

    Args:
        loader: batches, see :func:`nipq.prepare.batches.inputs_of`; read until there are ``count`` samples.
        count: how many samples, at least 2.

    Returns:
        The samples in batches of :data:`BATCH` at most, with their targets if there are some.

    Raises:
        ConfigError: if there are fewer than 2 samples, or all of them are equal.
        NonFiniteError: if a sample holds NaN or infinity.
    """
    if count < 2:
        raise ConfigError(f"quantize: expected samples of at least 2, found {count}. A few hundred do.")
    batches: list[tuple[Any, int]] = []
    read = 0
    for batch in loader:
        size = sample_count(batch)
        taken = min(size, count - read)
        batches += [
            (cut(batch, start, min(start + BATCH, taken), size), min(start + BATCH, taken) - start)
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
    _check([batch for batch, _ in batches])
    fit, held_out, left = [], [], read - max(1, read // HELD_OUT)
    fit_count = left
    for batch, size in batches:
        if left > 0:
            fit.append(batch if size <= left else cut(batch, 0, left, size))
        if size > left:
            held_out.append(batch if left <= 0 else cut(batch, left, size, size))
        left -= min(size, left)
    return Samples(fit, held_out, fit_count, read - fit_count)


def sample_count(batch: Any) -> int:  # noqa: ANN401  (whatever a loader yields)
    """Samples in a batch: the length of the first tensor among the inputs.

    Args:
        batch: what a loader yields.

    Raises:
        ConfigError: if there is no such tensor, or it has no batch dimension.
    """
    first = next(tensors_in(inputs_of(batch)), None)
    if first is None or first.ndim == 0:
        raise ConfigError(
            "loader: expected batches of tensors whose first dimension is the sample, found none. "
            "Let it yield the model's inputs."
        )
    return len(first)


def cut(batch: Any, start: int, stop: int, size: int) -> Any:  # noqa: ANN401  (whatever a loader yields)
    """Some samples of a batch; what is not a tensor with one entry for each sample stays whole.

    Args:
        batch: tensors in mappings, tuples and lists.
        start: the first sample.
        stop: the one after the last.
        size: samples in the batch.
    """
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: cut(value, start, stop, size) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [cut(value, start, stop, size) for value in batch]
    return batch


def _check(batches: list[Any]) -> None:
    """Refuse samples that are not finite, or all equal."""
    first, differ = None, False
    for batch in batches:
        tensors = list(tensors_in(inputs_of(batch)))
        for tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    "quantize: expected finite samples, found NaN or infinity among them. Look at the loader."
                )
        first = [tensor[:1] for tensor in tensors] if first is None else first
        differ = differ or any(
            a.shape[1:] != b.shape[1:] or not torch.equal(a.expand_as(b), b)
            for a, b in zip(first, tensors, strict=False)
            if b.ndim
        )
    if not differ:
        raise ConfigError(
            "quantize: expected samples that differ, found that all are equal. Give a few hundred real samples."
        )
