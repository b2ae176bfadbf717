"""The weight of a prepared layer as others see it: reading gives the quantized weight, writing moves the float one.

``layer.weight`` is computed from the float weight anew whenever it is looked at, so a write into it would be lost:
``nn.init.zeros_(layer.weight)``, ``layer.weight.data += delta`` as adapters are merged, ``layer.weight[0] = 0``. A
:class:`WeightView` passes such writes on. A write into a view of it (``layer.weight[0].zero_()``) cannot be passed on
and raises, at once or at the next look at the weight; arrays of it are read-only. Two writes are not noticed: into a
view that a function made and that outlives the weight (``torch.chunk(layer.weight, 2)[0].zero_()``), and
``torch.utils.swap_tensors``. To watch for them would cost every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nipq.errors import OrderError


class WeightView(Tensor):
    """A quantized weight whose methods that write write to the float weight instead; else a tensor like any other."""

    # Operations on it are those on a plain tensor, at no cost, and give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    #: What passes writes on, the float weight, and the version of this tensor when it was made.
    _link: tuple[WrittenWeight, Tensor, int]

    @property
    def data(self) -> Tensor:
        """The float weight's data: what is written there stays."""
        return self._link[0].read(self._link[1])

    @data.setter
    def data(self, value: Tensor) -> None:
        self.target.data = value

    @property
    def grad(self) -> Tensor | None:
        """The float weight's gradient."""
        return self._link[1].grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.target.grad = value

    @property
    def requires_grad(self) -> bool:
        """True if this tensor requires gradients; set, it is the float weight that does."""
        return bool(Tensor.requires_grad.__get__(self))  # type: ignore[attr-defined]  # a descriptor of torch's

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.target.requires_grad = value

    @property
    def target(self) -> Tensor:
        """The float weight, where writes go."""
        return self._link[0].target(self._link[1])

    def __setitem__(self, place: Any, value: Any) -> None:  # noqa: ANN401  (as torch's own)
        """Write into the float weight."""
        self.target[place] = value

    def __del__(self) -> None:
        """Notice a write into a view."""
        if self._version != self._link[2]:
            self._link[0].lost = True


class WeightPart(Tensor):
    """A part of a quantized weight, or another shape of it: writes are refused, as they would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    _owner: WrittenWeight


class WrittenWeight:
    """Passes writes on for the weights that one quantizer makes.

    Args:
        name: full name of the weight, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name, self.lost = name, False

    def view(self, quantized: Tensor, weight: Tensor) -> Tensor:
        """A quantized weight whose writes go to the float weight.

        Only of a plain parameter, and not while torch traces or compiles, where nothing is written.

        Args:
            quantized: the weight on its levels.
            weight: the float weight.

        Raises:
            OrderError: if something wrote into a view of an earlier one.
        """
        if (
            type(weight) is not nn.Parameter
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
        ):
            return quantized
        if self.lost:
            self.lost = False
            raise self.error()
        view = quantized.as_subclass(WeightView)
        view._link = self, weight, view._version
        return view

    def target(self, weight: Tensor) -> Tensor:
        """The float weight, which a write goes to."""
        return weight

    def read(self, weight: Tensor) -> Tensor:
        """Data of the float weight."""
        return weight.data

    def error(self) -> OrderError:
        """The error for a write that is lost."""
        return OrderError(
            f"{self.name}: expected writes to the weight itself, found one to a part or another shape of it, which "
            "is lost as the quantized weight is computed anew. Write to "
            "layer.parametrizations.weight.original, or use nipq.restore_(model) first."
        )


class FixedWeight(WrittenWeight):
    """Refuses writes to the weight of a deployed layer, which is stored in whole codes."""

    def fixed(self, quantized: Tensor) -> Tensor:
        """A weight whose writes are refused."""
        if _traced():
            return quantized
        view = quantized.as_subclass(WeightView)
        view._link = self, quantized, view._version
        return view

    def target(self, weight: Tensor) -> Tensor:
        """Refuse.

        Raises:
            OrderError: always.
        """
        del weight
        raise self.error()

    def read(self, weight: Tensor) -> Tensor:
        """Data that cannot be written to."""
        return cast(Tensor, _marked(weight.data, self))

    def error(self) -> OrderError:
        """The error for a write."""
        return OrderError(
            f"{self.name}: expected nothing to be written to the weight of a deployed layer, which is stored in whole "
            "codes. Change the trained model, and call nipq.convert again."
        )


def _traced() -> bool:
    """Return whether torch compiles or traces, where nothing is written and a subclass would be in the way."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _writing(name: str) -> Callable[..., Any]:
    def write(self: WeightView, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (torch's own arguments)
        getattr(self.target, name)(*args, **kwargs)
        return self

    write.__name__ = name
    write.__doc__ = f"``Tensor.{name}`` on the float weight."
    return write


def _marked(found: Any, owner: WrittenWeight) -> Any:  # noqa: ANN401  (a tensor, or several)
    """Parts of a weight that refuse writes."""
    if isinstance(found, Tensor):
        found = found.as_subclass(WeightPart)
        found._owner = owner
        return found
    parts = (_marked(one, owner) for one in found)
    return tuple(parts) if isinstance(found, tuple | list) else parts  # the latter of iter()


def _part(name: str) -> Callable[..., Any]:
    inner = getattr(Tensor, name)
    inner = inner if callable(inner) else inner.__get__

    def part(self: WeightView | WeightPart, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (torch's own arguments)
        found = inner(self, *args, **kwargs)
        return found if _traced() else _marked(found, self._link[0] if isinstance(self, WeightView) else self._owner)

    part.__name__ = name
    part.__doc__ = f"``Tensor.{name}``; what it gives cannot be written to."
    return part


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: WeightPart, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401  (torch's own arguments)
        raise self._owner.error()

    refuse.__name__ = name
    refuse.__doc__ = "Refuse to write what would be lost."
    return refuse


def _read_only(name: str) -> Callable[..., Any]:
    def array(self: WeightView | WeightPart, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (torch's own arguments)
        found = getattr(Tensor, name)(self, *args, **kwargs)
        found.flags.writeable = False
        return found

    array.__name__ = name
    array.__doc__ = f"``Tensor.{name}``, read-only: what is written there would be lost."
    return array


#: Methods of a tensor that write.
_WRITES = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
_WRITES += [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")]
#: Methods that give a part of a tensor, or another shape of it, in the same memory.
_PARTS = (
    "__getitem__", "view", "view_as", "reshape", "flatten", "t", "transpose", "permute", "unsqueeze", "squeeze",
    "narrow", "select", "detach", "diagonal", "movedim", "unflatten", "chunk", "split", "tensor_split", "unbind",
    "expand", "expand_as", "as_strided", "unfold", "swapaxes", "swapdims", "moveaxis", "adjoint", "ravel", "__iter__",
)  # fmt: skip

for _name in _WRITES:
    setattr(WeightView, _name, _writing(_name))
    setattr(WeightPart, _name, _refusing(_name))
for _kind in (WeightView, WeightPart):
    for _name in _PARTS:
        setattr(_kind, _name, _part(_name))
    for _name in ("numpy", "__array__"):
        setattr(_kind, _name, _read_only(_name))
    for _name in ("T", "mT", "H", "mH"):
        setattr(_kind, _name, property(_part(_name)))
WeightPart.__setitem__ = _refusing("__setitem__")  # type: ignore[method-assign]
WeightPart.data = property(_part("data"), _refusing("data"))  # type: ignore[assignment]
