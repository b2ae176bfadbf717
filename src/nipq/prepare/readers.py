"""Readers of tensors and parameters during one forward, and calls of a module that pass its hooks by.

A dispatch mode sees every operation, those of scripted functions, custom operators and views included. Parameters
are looked up in a dictionary that reports it, so that a model which only asks whether a bias is there is seen, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nipq.prepare.batches import tensors_in


class ReaderMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no type
    """Names of the innermost modules in which operations read a tensor, by the tensor's id.

    Args:
        stack: the modules whose forward is running, innermost last; kept up to date by the caller.
        names: full name of each module.
    """

    def __init__(self, stack: list[nn.Module], names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.stack, self.names = stack, names
        self.of: dict[int, set[str]] = {}
        #: Modules that hold a parameter, by the parameter's id.
        self.owners: dict[int, set[nn.Module]] = {}
        #: Readers of a parameter outside of the modules that hold it, by its id.
        self.outside: dict[int, set[str]] = {}
        #: Parameters that an operation wrote into, by their ids, and where the elements of each are.
        self.written: set[int] = set()
        self.storages: dict[int, int] = {}
        self.keep: list[object] = []  # ids stay unique only while the tensors live

    def watch(self, module: nn.Module, tensors: Iterable[Tensor | None]) -> None:
        """Watch tensors that a module holds: readers outside of it, and writers.

        Args:
            module: the module.
            tensors: its parameters and buffers.
        """
        for tensor in tensors:
            self.owners.setdefault(id(tensor), set()).add(module)
            if isinstance(tensor, nn.Parameter) and (place := _place(tensor)):
                self.storages[place] = id(tensor)

    def read(self, tensor: Tensor) -> None:
        """Note that the module which is running reads a tensor."""
        where = self.names[self.stack[-1]] if self.stack else ""
        self.of.setdefault(id(tensor), set()).add(where)
        owners = self.owners.get(id(tensor))
        if owners is not None and owners.isdisjoint(self.stack):
            self.outside.setdefault(id(tensor), set()).add(where)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation; what it is given has one more reader."""
        operands = [*tensors_in(args), *tensors_in(kwargs or {})]
        self.keep.append(operands)
        for tensor in operands:
            self.read(tensor)
        if operands and func._schema.is_mutable:  # type: ignore[attr-defined]  # operators have one
            changed = [*operands[:1], *tensors_in((kwargs or {}).get("out"))]
            self.written |= {self.storages[place] for place in map(_place, changed) if place in self.storages}
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    """Address of a tensor's elements; 0 for tensors that have none of their own."""
    plain = tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter)
    return tensor.untyped_storage().data_ptr() if plain else 0


class _Reported(dict[str, Any]):
    """The parameters of a module, with a function that is told of every look at one of them."""

    def __init__(self, parameters: Mapping[str, Any], report: Callable[[str], None]) -> None:
        super().__init__(parameters)
        self.report = report

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401  (as dict's own)
        self.report(key)
        return super().__getitem__(key)


@contextmanager
def parameters_watched(modules: Mapping[nn.Module, str], report: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Report every look at a module's parameter by its name (``layer.weight``), whoever looks.

    Args:
        modules: the modules, and their names.
        report: called with the module and the name of the parameter.
    """
    before = {module: module._parameters for module in modules if module._parameters}
    for module, parameters in before.items():
        module.__dict__["_parameters"] = _Reported(parameters, partial(report, module))
    try:
        yield
    finally:
        for module, parameters in before.items():
            now = dict(module._parameters.items())
            parameters.clear()
            parameters.update(now)  # the forward may have set one
            module.__dict__["_parameters"] = parameters


@contextmanager
def forwards_watched(
    modules: Iterator[nn.Module], stack: list[nn.Module], report: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Report calls of a module's forward that pass its hooks by, such as ``layer.forward(x)`` or ``_conv_forward``.

    Args:
        modules: the modules.
        stack: the modules whose hooks say that their forward is running, innermost last.
        report: called with the module.
    """

    def called(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if stack[-1:] == [module]:
            return original(*args, **kwargs)
        report(module)
        stack.append(module)
        try:
            return original(*args, **kwargs)
        finally:
            stack.pop()

    methods = [(module, name) for module in modules for name in ("forward", "_conv_forward") if hasattr(module, name)]
    before = {method: method[0].__dict__.get(method[1]) for method in methods}
    for module, name in methods:
        module.__dict__[name] = partial(called, module, getattr(module, name))
    try:
        yield
    finally:
        for (module, name), own in before.items():
            del module.__dict__[name]
            if own is not None:
                module.__dict__[name] = own


def held(tensors: Mapping[int, Tensor]) -> set[int]:
    """Ids of the tensors that anything else than this mapping still refers to.

    An output of the model, however it is wrapped, an attribute, a list that a hook fills.

    Args:
        tensors: each by its id; the only references to them that are known.
    """
    unheld = _references({0: nn.Parameter()})[0]
    return {key for key, count in _references(tensors).items() if count > unheld}


def _references(tensors: Mapping[int, Tensor]) -> dict[int, int]:
    return {key: sys.getrefcount(tensors[key]) for key in tensors}
