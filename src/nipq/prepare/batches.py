"""Batches of a loader: find a model's inputs in them, call it, move tensors to a device, keep ranks in step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed import all_or_none, gather_objects, inner, is_distributed
from nipq.errors import ConfigError, NipqError, first_line
from nipq.prepare.input_form import (
    ExampleInputs,
    InputForm,
    described,
    described_inputs,
    form_of,
    guessed_inputs,
    known_form,
    left_over,
    map_tensors,
    tensors_in,
    the_rest,
)

__all__ = [
    "BatchReader",
    "ExampleInputs",
    "Inputs",
    "batches_of",
    "call_model",
    "check_rereadable",
    "copy_of",
    "device_of",
    "evaluating",
    "map_tensors",
    "tensors_in",
    "to_device",
]

#: Function from a batch of a loader to what the model is called with.
Inputs = Callable[[Any], ExampleInputs]


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


def copy_of(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, also of one that keeps results of a forward, such as its last features.

    Python's own copy refuses tensors that belong to an autograd graph; here they are copied without the graph.

    Args:
        model: the model.
        memo: copies of some of its objects, by their ids, as for ``copy.deepcopy``.

    Returns:
        The copy.
    """
    known = dict(memo or {})
    for module in model.modules():
        for tensor in _kept_tensors(vars(module)):
            if not tensor.is_leaf:
                known[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, known)


def _kept_tensors(value: object) -> Iterator[Tensor]:
    """The tensors among attributes, in containers and dataclasses, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _kept_tensors(item)
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from _kept_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _kept_tensors(getattr(value, "__dict__", {}))


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
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"), inputs)


class BatchReader:
    """Finds a model's inputs and the targets in the batches of a loader; says by name what is wrong with a batch.

    The inputs are where the form of ``prepare_``'s example inputs says, see :mod:`nipq.prepare.input_form`; of a model
    that was not prepared, where the arguments of its forward say. ``inputs`` decides instead where it is given.

    The targets, for a ``loss_fn(outputs, targets)``, are what stands after the inputs: the one item, or a tuple of
    several; in mappings ``labels``, ``label``, ``targets`` or ``target``. With ``inputs`` they are the items of the
    batch that ``inputs`` does not return, or all after the first one where it returns none of them as it is.

    Args:
        model: the model that is called; may be wrapped.
        inputs: a function from a batch to what the model is called with: a tensor, a tuple, or a dict of keywords.
        purpose: the function that reads, for messages.
        example_inputs: of a model that is not prepared yet, whose form decides then.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None = None,
        purpose: str = "loader",
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        if inputs is not None and not callable(inputs):
            raise ConfigError(
                f"{purpose}: expected inputs=, a function from a batch to what the model is called with, found "
                f"{type(inputs).__name__}. Give one, such as inputs=lambda batch: batch[0]."
            )
        self._model, self._own, self.purpose = inner(model), inputs, purpose
        self._form = known_form(model) if example_inputs is None else form_of(example_inputs, self._model)

    def read(self, loader: Iterable[Any] | None, most: int | None = None) -> Iterator[tuple[str, Any]]:
        """Read batches, each with a name for messages.

        Args:
            loader: an iterable of batches.
            most: how many to read; all if left out.

        Yields:
            Name and batch.

        Raises:
            ConfigError: if the loader is none, or has no batch.
        """
        place = f"{self.purpose}, "
        number = -1
        for number, batch in enumerate(islice(batches_of(loader, self.purpose), most)):
            yield f"{place}batch {number}", batch
        if number < 0 and most != 0:
            raise ConfigError(
                f"{self.purpose}: expected at least one batch, found an empty loader, or one that was read before and "
                "can be read only once. Give a DataLoader or a list with some data."
            )

    def inputs(self, batch: Any, where: str | None = None) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
        """The model's inputs in a batch, checked.

        Args:
            batch: what a loader yields.
            where: name of the batch for messages.

        Returns:
            A tensor, a tuple of positional inputs, or a dict of keyword inputs.

        Raises:
            ConfigError: if they are not found, or are not what the model takes.
        """
        with _named(where or self.purpose):
            if self._own is not None:
                found = self._chosen(batch)
                form = self._form if self._form is not None and self._form.is_called_so(found) else form_of(found)
            else:
                if self._form is None:
                    self._form = form_of(guessed_inputs(batch, self._model), self._model)
                form, found = self._form, self._form.inputs(batch)
            form.check(found)
        return found

    def targets(self, batch: Any, where: str | None = None) -> Any:  # noqa: ANN401  (whatever a loader yields)
        """The targets in a batch, see the class.

        Args:
            batch: what a loader yields.
            where: name of the batch for messages.

        Raises:
            ConfigError: if there are none.
        """
        with _named(where or self.purpose):
            if self._own is not None:
                return the_rest(left_over(batch, self._chosen(batch)), batch)
            self.inputs(batch, where)  # decides about the form
            assert self._form is not None
            return self._form.targets(batch)

    def samples(self, inputs: ExampleInputs) -> int:
        """Number of samples that inputs hold."""
        return self._form_for(inputs).samples(inputs)

    def cut(self, inputs: ExampleInputs, start: int, stop: int) -> ExampleInputs:
        """Some samples of inputs; what belongs to all of them stays whole, see :meth:`InputForm.cut`."""
        return self._form_for(inputs).cut(inputs, start, stop)

    def call(self, model: nn.Module, inputs: ExampleInputs, where: str | None = None) -> Any:  # noqa: ANN401
        """Call a model; an error of its forward tells which batch it was and what it was called with.

        Args:
            model: the model.
            inputs: what :meth:`inputs` returned, on the model's device.
            where: name of the batch for messages.

        Returns:
            The model's outputs.

        Raises:
            ConfigError: if the forward fails.
        """
        try:
            return call_model(model, inputs)
        except (NipqError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{where or self.purpose}: expected inputs that the model takes, found that its forward fails on "
                f"{described_inputs(inputs)}: {first_line(error)}. Correct the batch, or give inputs=, a function from "
                "a batch to what the model is called with."
            ) from error

    def in_step(self, loader: Iterable[Any], most: int | None = None) -> Iterator[tuple[str, ExampleInputs, float]]:
        """Yield a loader's inputs while every rank has some, so that all ranks take the same number of batches.

        Args:
            loader: batches.
            most: how many to read; all if left out.

        Yields:
            Name of the batch, inputs, and how many samples all ranks have for each of this one.

        Raises:
            ConfigError: if a batch is wrong, or there is none.
            DistributedError: if the loader of another rank failed.
        """
        if not is_distributed():
            yield from ((where, self.inputs(batch, where), 1.0) for where, batch in self.read(loader, most))
            return
        batches = self.read(loader, most)
        while True:
            with all_or_none(self.purpose):
                where, batch = next(batches, ("", None))
                inputs = self.inputs(batch, where) if where else None
                own = 0 if inputs is None else self.samples(inputs)
            sizes = gather_objects(own)
            if inputs is None or not all(sizes):
                return
            yield where, inputs, sum(sizes) / own

    def _chosen(self, batch: Any) -> ExampleInputs:  # noqa: ANN401
        """Inputs as the caller's function returns them."""
        assert self._own is not None
        try:
            found = self._own(batch)
        except NipqError:
            raise
        except Exception as error:
            raise ConfigError(
                f"expected inputs= to take a batch, found that it fails on {described(batch)}: "
                f"{type(error).__name__}: {first_line(error)}. Correct the function."
            ) from error
        if not isinstance(found, (Tensor, tuple, list, Mapping)) or next(tensors_in(found), None) is None:
            raise ConfigError(
                f"expected inputs= to return a tensor, a tuple of inputs, or a dict of keywords, found "
                f"{described(found)}. Correct the function."
            )
        return found

    def _form_for(self, inputs: ExampleInputs) -> InputForm:
        form = self._form
        return form if form is not None and form.is_called_so(inputs) else form_of(inputs)


def batches_of(loader: Iterable[Any] | None, purpose: str) -> Iterator[Any]:
    """Iterate over a loader.

    Args:
        loader: an iterable of batches.
        purpose: the function that reads, for messages.

    Raises:
        ConfigError: if it cannot be iterated over.
    """
    if isinstance(loader, (Tensor, Mapping, str)) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise ConfigError(
            f"{purpose}: expected a loader, an iterable of batches, found {described(loader)}. "
            "Give a DataLoader, or a list of batches."
        )
    return iter(loader)  # type: ignore[arg-type]  # checked above


def check_rereadable(loader: object, purpose: str) -> None:
    """Refuse a loader that ends after one pass, such as a generator.

    Args:
        loader: that is to be read several times.
        purpose: the function that reads it, for messages.

    Raises:
        ConfigError: if it is one.
    """
    if isinstance(loader, Iterator):
        raise ConfigError(
            f"{purpose}: expected a loader that can be read several times, found a {type(loader).__name__}, "
            "which ends after one pass. Give the DataLoader or list itself."
        )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of a batch in front of messages about it."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        if text.startswith(where):
            raise
        raise ConfigError(f"{where}: {text}") from error.__cause__
