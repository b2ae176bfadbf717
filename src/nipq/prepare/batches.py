"""Read batches of a loader: the model's inputs in them, their device, the same number on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nipq.distributed import (
    all_or_none,
    gather_objects,
    is_distributed,
)
from nipq.errors import ConfigError
from nipq.prepare.trace import ExampleInputs, tensors_in


def inputs_of(batch: Any) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
    """What the model is called with, out of what a loader yields.

    Args:
        batch: a tensor; a tuple or list whose first item is the model's input; or a mapping of keyword inputs.

    Returns:
        The input.

    Raises:
        ConfigError: if no tensor is found there.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("label", "labels", "target")}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        return inputs_of(batch[0])
    raise ConfigError(
        f"loader: expected batches of tensors, found {type(batch).__name__}. "
        "Let it yield a tensor, a tuple or list with the input first, or a dict of keyword inputs."
    )


def to_device(inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    """Move example inputs to a device, in any of their accepted forms."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return [value.to(device) if isinstance(value, Tensor) else value for value in inputs]


def in_step(loader: Iterable[Any], what: str) -> Iterator[tuple[ExampleInputs, float]]:
    """Inputs while every rank has some.

    Args:
        loader: batches, see :func:`inputs_of`.
        what: what they are for, for the message.

    Yields:
        Inputs, and how many samples all ranks have for each of this one.

    Raises:
        ConfigError: if a batch holds no tensor.
        DistributedError: if the loader of another rank failed.
    """
    if not is_distributed():
        yield from ((inputs_of(batch), 1.0) for batch in loader)
        return
    batches = iter(loader)
    while True:
        with all_or_none(what):
            batch = next(batches, None)
            inputs = None if batch is None else inputs_of(batch)
            own = 0 if inputs is None else _samples(inputs)
        sizes = gather_objects(own)
        if inputs is None or not all(sizes):
            return
        yield inputs, sum(sizes) / own


def _samples(inputs: ExampleInputs) -> int:
    first = next(tensors_in(inputs), None)
    if first is None:
        raise ConfigError("loader: expected a tensor in every batch, found none. Let it yield the model's inputs.")
    return len(first)
