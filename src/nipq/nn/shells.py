"""Shells of trained layers, which run their operation on any weight, and subclasses made while a program runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nipq.nn.kinds import Conv1D, is_plain, shell_class

#: Where a module keeps its hooks.
HOOKS = [key for key in vars(nn.Module()) if key.endswith("_hooks") or "_hooks_" in key]
#: What a shell does not take over: the weight, and what prepares a layer.
_NOT_KEPT = ("weight", "parametrizations", "quantization")

#: Makes bases and members of a subclass from a user's class; not a closure or a lambda, as pickles store its name.
Recipe = Callable[[type[nn.Module]], tuple[tuple[type, ...], dict[str, Any]]]
#: Subclasses by recipe and class.
_MADE: dict[tuple[Recipe, type[nn.Module]], type[nn.Module]] = {}


def subclass(recipe: Recipe, kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a user's class, one for each recipe and class, with the name of that class.

    Its instances can be copied and pickled as those of any module: what is stored is the recipe and the class.

    Args:
        recipe: makes bases and members.
        kind: the user's class.
    """
    if (recipe, kind) not in _MADE:
        bases, members = recipe(kind)

        def reduce(self: nn.Module, _protocol: object) -> tuple[Any, ...]:
            return _empty, (recipe, kind), self.__getstate__()  # type: ignore[no-untyped-call]  # object's own

        members = {"__module__": kind.__module__, "__reduce_ex__": reduce} | members
        _MADE[recipe, kind] = type(kind.__name__, bases, members)
    return _MADE[recipe, kind]


def _empty(recipe: Recipe, kind: type[nn.Module]) -> nn.Module:
    return object.__new__(subclass(recipe, kind))


def own_forward_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that runs the class's own forward on whatever weight a deployed layer holds.

    Args:
        kind: class of the trained layer, one with a forward of its own.
    """
    return subclass(_own_forward, kind)


def _own_forward(kind: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    def weight(self: nn.Module) -> Tensor:
        stored = self._buffers["weight"]
        assert stored is not None
        if stored.is_floating_point():
            return stored  # put there while a file is written
        used: Tensor = self.deployed_in[0].used_weight  # type: ignore[union-attr, index]  # torch types it as a module
        return used

    return (kind,), {"weight": property(weight)}


def plain_shell(layer: nn.Module) -> nn.Module:
    """A layer of the same class and settings with no weight yet and no bias, to run its operation on any weight.

    Args:
        layer: a prepared or a plain layer, whose forward does nothing but its operation.

    Returns:
        A module for :func:`nipq.nn.kinds.run_operation`; where its class has a forward of its own, one of the class
        that :func:`own_forward_class` makes.
    """
    kind = shell_class(layer)
    if kind is not Conv1D and not is_plain(layer):
        shell = kept_shell(layer, kind)
        shell._parameters["bias"] = None
        return shell
    shell = object.__new__(kind)
    nn.Module.__init__(shell)
    internal = set(vars(shell))
    vars(shell).update((key, value) for key, value in vars(layer).items() if key not in internal and key != "forward")
    shell._buffers["weight"] = None
    shell.register_parameter("bias", None)
    return shell.eval()


def kept_shell(layer: nn.Module, kind: type[nn.Module] | None = None) -> nn.Module:
    """A layer with all that it holds but its weight and its hooks, to run its own forward on any weight.

    Args:
        layer: its parameters, buffers and modules are shared.
        kind: its class, if it is prepared.
    """
    shell = object.__new__(own_forward_class(kind or type(layer)))
    vars(shell).update((key, value) for key, value in vars(layer).items() if key != "forward")
    fresh = vars(nn.Module())
    vars(shell).update((key, fresh[key]) for key in HOOKS)
    for part in ("_parameters", "_buffers", "_modules"):
        vars(shell)[part] = {key: value for key, value in vars(layer)[part].items() if key not in _NOT_KEPT}
    return shell.eval()
