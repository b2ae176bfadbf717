"""Example inputs and batches of a loader: call a model with them, move them to a device, keep ranks in step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed import all_or_none, gather_objects, is_distributed
from nipq.errors import ConfigError

#: Arguments that a model is called with: one tensor, several positional ones, or keywords.
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    """Call a model with example inputs in any of the accepted forms."""
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode; every module has its own mode back when the context ends."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in mappings, tuples and lists, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def inputs_of(batch: Any) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
    """The model's inputs in a batch of a loader, without labels.

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


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, or of its first buffer; the CPU for a model without tensors.

    Deployed models may hold buffers alone.
    """
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def to_device(inputs: Any, device: torch.device) -> Any:  # noqa: ANN401  (a model's inputs in any form)
    """Move the tensors in mappings, tuples and lists, however deep, to a device; other objects stay as they are.

    Args:
        inputs: a model's inputs, or a whole batch.
        device: where the tensors go.

    Returns:
        The same structure: mappings as dicts, other sequences as lists or tuples.

    Example:
        >>> to_device({"x": [torch.zeros(1)], "mode": "fast"}, torch.device("cpu"))
        {'x': [tensor([0.])], 'mode': 'fast'}
    """
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=device.type != "cpu")
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        moved = [to_device(value, device) for value in inputs]
        if isinstance(inputs, list):
            return moved
        return type(inputs)(*moved) if hasattr(inputs, "_fields") else tuple(moved)
    return inputs


def in_step(loader: Iterable[Any], what: str) -> Iterator[tuple[ExampleInputs, float]]:
    """Yield a loader's inputs while every rank has some, so that all ranks take the same number of batches.

    Args:
        loader: batches, see :func:`inputs_of`.
        what: purpose of the batches, for messages.

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
