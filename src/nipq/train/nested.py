"""Batches in any form: a tensor, a mapping of tensors, or nothing. The first axis counts samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Nested = Tensor | Mapping[str, Tensor]
"""Inputs of a model, or targets of a task."""


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
    """On another device; with ``channels_last`` images, that is tensors of four axes, in that memory layout."""
    if isinstance(value, Mapping):
        return {key: moved(tensor, device, channels_last=channels_last) for key, tensor in value.items()}
    if value is None:
        return None
    layout = torch.channels_last if channels_last and value.ndim == 4 else torch.contiguous_format
    return value.to(device, memory_format=layout, non_blocking=True)


def shape_of(value: Nested) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Shape of the tensor, or of each, for messages."""
    return tuple(value.shape) if isinstance(value, Tensor) else {key: tuple(t.shape) for key, t in value.items()}


def all_finite(value: Nested) -> bool:
    """Whether no number is NaN or infinite."""
    tensors = [value] if isinstance(value, Tensor) else list(value.values())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
