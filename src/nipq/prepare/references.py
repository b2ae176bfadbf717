"""References to modules that copies of a model share: closures, globals and default arguments of functions."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import partial

from torch import nn

#: Remedy where a copy calls a module of the model that it is a copy of.
KEEP = "Keep layers in attributes, lists or dicts of the model, and reach them from there."


def with_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters or buffers of their own, by full name: a copy that shares one is no copy."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(part is not None for parts in (module._parameters, module._buffers) for part in parts.values())
    }


def way_to(model: nn.Module, layer: nn.Module) -> str:
    """Describe the way by which something else than the tree of modules reaches a layer.

    Args:
        model: holds the layer.
        layer: which copies of the model were found to call.
    """
    for name, module in model.named_modules():
        owner = name or type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and _reaches(value, layer):
                return f"through the function that {owner} keeps as {key!r}, which copies share"
        for kind in type(module).__mro__:
            for key, value in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
                if isinstance(value, types.FunctionType) and _reaches(value, layer):
                    return f"through a closure or global of {kind.__name__}.{key}, which copies share"
    return "through a closure, a global or another reference that copies share"


def _reaches(value: object, layer: nn.Module, depth: int = 0) -> bool:
    """Return whether a function, or a list or dict of them, holds on to a layer or to a module that has it."""
    if isinstance(value, nn.Module):
        return depth > 0 and any(module is layer for module in value.modules())
    if depth > 4:
        return False
    inside: list[object] = []
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        inside += [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__, value.__func__]
    elif isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, (tuple, list, set)):
        inside = list(value)
    return any(_reaches(item, layer, depth + 1) for item in inside)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
