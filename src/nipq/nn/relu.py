"""Folding a ReLU into the unsigned quantizer behind it: truncation at 0 does the same, so training leaves it out.

min(max(x, 0), cap) before the noise proxy or the true quantizer on an unsigned grid gives the same value and the same
gradients as the quantizer alone, told the cap of a ReLU6: below 0 both give 0 and pass no gradient. What is saved is a
pass over memory in either direction and the ReLU's own result, which nothing keeps any more.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

#: Modules that can be left out, with their upper ends.
CAPS = {nn.ReLU: math.inf, nn.ReLU6: 6.0}


class ReluQuantizer(Protocol):
    """An input quantizer as a folded ReLU needs it, see ``nipq.nn.quantizer.InputQuantizer``."""

    cap: float

    def replaces_relu(self, x: Tensor) -> bool:
        """Return whether the next call does what the ReLU would do."""


def cap_of(module: nn.Module) -> float | None:
    """Upper end of a ReLU; None for any other module, subclasses included, as they may do more.

    Args:
        module: any module.
    """
    return next((cap for kind, cap in CAPS.items() if type(module) is kind), None)


class Neighbours(NamedTuple):
    """Two modules of which nothing but ``nn.Sequential`` containers decides that the second reads the first.

    Attributes:
        common: full name of the innermost container that holds both.
        ending: of the containers inside of it that the first one ends, outermost first.
        beginning: of those that the second one begins, likewise.
    """

    common: str
    ending: tuple[str, ...]
    beginning: tuple[str, ...]


def neighbours(model: nn.Module, first: str, second: str) -> Neighbours | None:
    """Containers around two modules that follow one another in ``nn.Sequential`` containers.

    Where these run as modules, no other branch can read the result of the first, such as an auxiliary head.

    Args:
        model: holds both.
        first: full name.
        second: full name.

    Returns:
        The containers, or None if anything else decides what comes after the first.
    """
    name, ending = first, list[str]()
    while name:
        parent, _, child = name.rpartition(".")
        container = model.get_submodule(parent)
        if not _is_plain_sequence(container):
            return None
        children = list(container._modules)
        place = children.index(child) + 1
        if place < len(children):
            following, beginning = ".".join(filter(None, (parent, children[place]))), list[str]()
            while _is_plain_sequence(model.get_submodule(following)):
                inner = next(iter(model.get_submodule(following)._modules), None)
                if inner is None:
                    return None
                beginning.append(following)
                following = f"{following}.{inner}"
            return Neighbours(parent, tuple(ending), tuple(beginning)) if following == second else None
        ending.insert(0, parent)
        name = parent
    return None


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def fold_relu(relu: nn.Module, quantizer: ReluQuantizer) -> None:
    """Leave a ReLU out whenever the quantizer that alone reads it takes its place.

    Args:
        relu: of a kind in :data:`CAPS`.
        quantizer: of the input of the layer behind it.
    """
    cap = cap_of(relu)
    assert cap is not None
    quantizer.cap = cap
    relu.__dict__["folded_into"] = quantizer  # past __setattr__, so that it is not a submodule
    relu.forward = types.MethodType(_forward_unless_folded, relu)


def watch_hooks(relu: nn.Module, ended: Iterable[nn.Module], layer: nn.Module, begun: Iterable[nn.Module]) -> None:
    """Let a folded ReLU run whenever a hook would see its result, registered before this call or after it.

    Args:
        relu: as given to :func:`fold_relu`.
        ended: containers whose last module it is, so that their result is its own.
        layer: the prepared layer behind it.
        begun: containers whose first module the layer is, so that they are given the ReLU's result.
    """
    relu.__dict__["seen_by"] = tuple(ended), layer, tuple(begun)  # in a tuple, so that these are not submodules


def unfold_relu(relu: nn.Module) -> None:
    """Undo :func:`fold_relu`.

    Args:
        relu: as given to it.
    """
    relu.__dict__.pop("forward", None)
    relu.__dict__.pop("folded_into", None)
    relu.__dict__.pop("seen_by", None)


def _forward_unless_folded(relu: nn.Module, x: Tensor) -> Tensor:
    quantizer: ReluQuantizer = relu.__dict__["folded_into"]
    if relu.training and quantizer.replaces_relu(x) and not _is_seen(relu):
        return x
    result: Tensor = type(relu).forward(relu, x)
    return result


def _is_seen(relu: nn.Module) -> bool:
    """Return whether a hook may read the ReLU's result."""
    if relu._forward_hooks or relu._backward_hooks or _global_forward_hooks or _global_forward_pre_hooks:
        return True
    if "seen_by" not in relu.__dict__:
        return False
    ended, layer, begun = relu.__dict__["seen_by"]
    before = len(layer._forward_pre_hooks) > 1 or any(module._forward_pre_hooks for module in begun)  # one is ours
    return before or any(module._forward_hooks or module._backward_hooks for module in ended)
