"""Modules of a deployed model: layers and products inside attention on whole codes, for inference.

A deployed layer holds whole weight codes and a step for its input; after the integer sums come one multiply and one
add. A deployed product holds a step for each operand; one multiply comes after its sums.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, fx, nn

from nipq.errors import ConfigError
from nipq.functional.grid import GridKind
from nipq.functional.uniform import integer_codes
from nipq.nn.integer import bias_of, integer_forward, needs_float64, refuse_dropout, whole_product
from nipq.nn.kinds import along_channels, channel_dim, is_plain, is_table, run_operation, weight_channel_axis
from nipq.nn.shells import HOOKS, subclass
from nipq.nn.weight_view import FixedWeight

fx.wrap("whole_product")  # it looks at sizes, which a symbolic trace does not know
#: Refuses writes.
_FIXED = FixedWeight("layer.weight")


class _Deployed(nn.Module, ABC):
    """Base of the kinds of deployed layer.

    Args:
        layer: the trained layer's shell (see :func:`plain_shell`), or the layer itself for one whose own forward stays.
        weight: whole codes, int8 up to 8 bits and int16 above; a buffer of that module.
        weight_bits: bit-width of the weight.
        weight_grid: kind of the weight's grid.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
        dtype: floating type of the trained layer.
    """

    scale: Tensor
    offset: Tensor | None
    like: Tensor
    #: Buffers that are never in half precision.
    _EXACT: ClassVar[tuple[str, ...]] = ("scale", "input_step")
    #: Full name of the batch norm that was folded in, or None.
    batchnorm: str | None = None

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        weight_bits: int,
        weight_grid: GridKind,
        tied_to: str | None,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)  # not that of the trained layer's class, which a kept layer is an instance of, too
        # An empty tensor that changes its type with the module: results are of that type.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        self.weight_bits, self.weight_grid = weight_bits, weight_grid
        self.tied_to = tied_to
        layer._buffers["weight"] = weight  # past register_buffer: the class may have a property of that name
        layer.__dict__["deployed_in"] = (self,)  # in a tuple, so that it is not a submodule
        self.layer = layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, but numbers of the integer arithmetic stay in float32 at least, as they are not for rounding."""
        exact = {key: value for key, value in self._buffers.items() if key in self._EXACT and value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no type
        for key, value in exact.items():
            now = self._buffers[key]
            if now is not None and now.itemsize < value.itemsize and value.dtype == torch.float32:
                self._buffers[key] = value.to(now.device)
        return self

    @property
    def weight_codes(self) -> Tensor:
        """Whole weight codes, int8 or int16."""
        codes = self.layer._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def code_bits(self) -> int:
        """Bits of a symmetric grid that holds all codes in either sign.

        One more than ``weight_bits`` for the odd codes of a balanced grid and for the lowest one of a full grid.
        """
        return self.weight_bits + (self.weight_grid != "signed")

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at it."""

    @property
    @abstractmethod
    def used_weight(self) -> Tensor:
        """The weight that a forward of the layer's own computes with."""

    @property
    @abstractmethod
    def weight_scale(self) -> Tensor:
        """Step of the weight, units of the weight, one element or one for each channel."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (as torch's own)
        """Settings and parts of the trained layer, such as ``in_features``, for models that look at them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("layer")
            if layer is None or name.startswith("__") or name == "deployed_in":
                raise
            found = next((part for part in _parts(layer) if name in part), None)
            if found is None:
                raise
            return found[name]

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  (as torch's own)
        """Settings and parts of the trained layer are set there, where its operation reads them."""
        layer = self.__dict__.get("_modules", {}).get("layer")
        if layer is None or any(name in part for part in _parts(self)) or not any(name in p for p in _parts(layer)):
            super().__setattr__(name, value)
        else:
            setattr(layer, name, value)

    @property
    def kind(self) -> str:
        """Class name of the trained layer."""
        return type(self.layer).__name__

    @property
    def runs_own_forward(self) -> bool:
        """True for a layer whose class has a forward of its own."""
        return not is_plain(self.layer)


def _parts(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Whatever a module holds by name."""
    return vars(module), *(vars(module)[kind] for kind in ("_parameters", "_buffers", "_modules"))


def _seen_as(signature: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show tools that look at signatures, such as ``torch.fx``, that of another function, at no cost when it runs."""

    def mark(forward: Callable[..., Any]) -> Callable[..., Any]:
        forward.__wrapped__ = signature  # type: ignore[attr-defined]  # as functools.wraps does
        return forward

    return mark


class DeployedLayer(_Deployed):
    """A convolution or linear layer on whole codes.

    ``y = round(layer(codes(x), weight)) * scale + offset`` with ``codes(x) = clamp(round(x / input_step), low, high)``
    counted from the zero point, so that padding with zeros pads with code 0. ``layer`` is the trained layer's own class
    and settings with integer weights and no bias; ``scale`` and ``offset`` hold steps, bias and the folded batch norm.
    The result has the type of the input.

    Args:
        layer: an empty shell of the trained layer.
        weight: whole codes.
        scale: shape ``(channels,)``, float32; negative where a batch norm's gamma was.
        offset: shape ``(channels,)``, float32.
        input_step: step of the input, units of the input, one element, float32.
        weight_bits: bit-width of the weight.
        weight_grid: kind of the weight's grid.
        input_bits: bit-width of the input.
        grid: kind of the input's grid.
        zero_point: levels below zero.
        code_range: lowest and highest code of the input, counted from the zero point.
        batchnorm: full name of the batch norm that was folded in, or None.
        has_bias: whether the trained layer has a bias.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
        dtype: floating type of the trained layer.
    """

    _EXACT = ("scale", "offset", "input_step")

    offset: Tensor
    input_step: Tensor

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        scale: Tensor,
        offset: Tensor,
        input_step: Tensor,
        *,
        weight_bits: int,
        weight_grid: GridKind = "signed",
        input_bits: int,
        grid: GridKind,
        zero_point: int,
        code_range: tuple[int, int],
        batchnorm: str | None,
        has_bias: bool = True,
        tied_to: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # First, as attributes that the trained layer has, too, are set there once it is known.
        self.input_bits = input_bits
        self.grid = grid
        self.zero_point = zero_point
        # Numbers, not buffers: torch.export cannot read a buffer's value in a forward.
        self.code_low, self.code_high = code_range
        self.batchnorm = batchnorm
        self.has_bias = has_bias
        self.float64 = needs_float64(weight, self.code_low, self.code_high, weight_channel_axis(layer))
        super().__init__(layer, weight, weight_bits, weight_grid, tied_to, dtype)
        self._buffers |= {"scale": scale, "offset": offset, "input_step": input_step.reshape(1)}

    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of the input relative to the zero point, held as floats; shape of ``x``."""
        return integer_codes(x, self.input_step, self.code_low, self.code_high)

    @_seen_as(nn.Identity.forward)  # one input
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer's output, in the type of its input.

        Args:
            *args: the trained layer's arguments, the input first.
            **kwargs: the same by name.
        """
        args, kwargs, x = take_input(args, kwargs)

        def run(codes: Tensor, weight: Tensor) -> Tensor:
            return run_operation(self.layer, codes, weight, None, *args, **kwargs)

        dim = channel_dim(self.layer)
        y = integer_forward(run, self.codes(x), self.weight_codes, self.scale, self.offset, dim, self.float64)
        return y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, nothing computes with it here; not a number where a batch norm was folded into it.

        Models often look at its type or shape alone. With a batch norm folded in, the trained weight is no longer
        known, and a wrong one must not go unnoticed.
        """
        codes = self.weight_codes
        if self.batchnorm is not None:
            return _FIXED.fixed(self.like.new_full((), torch.nan).expand(codes.shape))
        steps = along_channels(self.weight_scale, self.layer, codes)
        return _FIXED.fixed((codes.to(self.scale.dtype) * steps).to(self.like.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The trained bias, or None; not a number where a batch norm was folded into it."""
        if not self.has_bias:
            return None
        if self.batchnorm is not None:
            return self.like.new_full((), torch.nan).expand(self.offset.shape)
        return self.offset.to(self.like.dtype)

    @property
    def used_weight(self) -> Tensor:
        """The whole codes in floats, as wide as their sums need."""
        return self.weight_codes.to(torch.float64 if self.float64 else torch.float32)

    @property
    def weight_scale(self) -> Tensor:
        """``scale`` without the input's step: with a batch norm folded in, the weight holds that, too."""
        return self.scale / self.input_step

    def extra_repr(self) -> str:
        """Bit-widths and grid."""
        folded = f", folded={self.batchnorm}" if self.batchnorm else ""
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits}, grid={self.grid}{folded}"


class DeployedWeightOnlyLayer(_Deployed):
    """A layer whose input stays float: the float layer with weight ``codes * scale``.

    A batch norm behind it is not folded, as its sums are floats anyway.

    Args:
        layer: an empty shell of the trained layer.
        weight: whole codes.
        scale: step of the weight, float32, one element or one per output channel.
        bias: the layer's bias, or None.
        weight_bits: bit-width of the weight.
        weight_grid: kind of the weight's grid.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
        dtype: floating type of the trained layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        weight_bits: int,
        weight_grid: GridKind = "signed",
        tied_to: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(layer, weight, weight_bits, weight_grid, tied_to, dtype)
        self._buffers |= {"scale": scale, "offset": bias}

    @_seen_as(nn.Identity.forward)  # one input
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer's output.

        Args:
            *args: the trained layer's arguments, the input first.
            **kwargs: the same by name.
        """
        args, kwargs, x = take_input(args, kwargs)
        if is_table(self.layer):  # look the codes up: a table is larger than the rows that are read
            steps = self.scale.reshape(-1, 1).expand(len(self.weight_codes), 1)
            rows, step = (
                run_operation(self.layer, x, part, None, *args, **kwargs) for part in (self.weight_codes, steps)
            )
            return (rows.to(step.dtype) * step).to(self.like.dtype)
        return run_operation(self.layer, x, self.used_weight, self.offset, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight as floats."""
        return _FIXED.fixed(self.used_weight)

    @property
    def bias(self) -> Tensor | None:
        """The trained bias, or None."""
        return self.offset

    @property
    def used_weight(self) -> Tensor:
        """Codes times the step."""
        codes = self.weight_codes
        return (codes.to(self.scale.dtype) * along_channels(self.scale, self.layer, codes)).to(self.like.dtype)

    @property
    def weight_scale(self) -> Tensor:
        """``scale``."""
        return self.scale

    def extra_repr(self) -> str:
        """Bit-width."""
        return f"weight_bits={self.weight_bits}, input float"


class DeployedKeptLayer(DeployedWeightOnlyLayer):
    """A layer with a forward of its own that does more than its operation, such as a gain or an activation.

    That forward runs as it did in training, on the input ``codes(x) * input_step`` and the weight ``codes * scale``, in
    floats. The layer's bias, other parameters, buffers and modules stay what they are.

    Args:
        layer: the trained layer without its weight, of a class that :func:`own_forward_class` made.
        weight: whole codes.
        scale: step of the weight, float32, one element or one per output channel.
        input_step: step of the input, float32; None when it stays float.
        weight_bits: bit-width of the weight.
        weight_grid: kind of the weight's grid.
        input_bits: bit-width of the input; None when it stays float.
        grid: kind of the input's grid.
        zero_point: levels below zero.
        code_range: lowest and highest code of the input, counted from the zero point.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
        dtype: floating type of the trained layer.
    """

    input_step: Tensor | None

    def __new__(cls, layer: nn.Module | None = None, *_args: Any, **_kwargs: Any) -> Self:  # noqa: ANN401
        """An instance of the trained layer's class, too, for models that ask for it or call its other methods."""
        # Without a layer for torch's compiler, which makes an empty one of the class that it has found.
        kind = cls if layer is None else subclass(_kept, type(layer).__bases__[0])
        return cast(Self, object.__new__(kind))

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        scale: Tensor,
        input_step: Tensor | None = None,
        *,
        weight_bits: int,
        weight_grid: GridKind = "signed",
        input_bits: int | None = None,
        grid: GridKind = "signed",
        zero_point: int = 0,
        code_range: tuple[int, int] = (0, 0),
        tied_to: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.input_bits = input_bits  # first, as in DeployedLayer
        self.grid = grid
        self.zero_point = zero_point
        self.code_low, self.code_high = code_range
        super().__init__(
            layer, weight, scale, None, weight_bits=weight_bits, weight_grid=weight_grid, tied_to=tied_to, dtype=dtype
        )
        self._buffers["input_step"] = None if input_step is None else input_step.reshape(1)

    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of a quantized input relative to the zero point, held as floats; shape of ``x``."""
        assert self.input_step is not None
        return integer_codes(x, self.input_step, self.code_low, self.code_high)

    def on_levels(self, x: Tensor) -> Tensor:
        """A quantized input on its levels: ``codes(x) * input_step``, type and shape of ``x``."""
        assert self.input_step is not None
        return (self.codes(x) * self.input_step).to(x.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The output of the layer's own forward.

        Args:
            *args: the trained layer's arguments, the input first.
            **kwargs: the same by name.
        """
        if self.input_step is not None:
            args, kwargs = with_input(args, kwargs, self.on_levels)
        result: Tensor = self.layer.forward(*args, **kwargs)
        return result

    @property
    def bias(self) -> Tensor | None:
        """The trained bias, or None."""
        return bias_of(self.layer)

    def extra_repr(self) -> str:
        """Bit-widths and grid."""
        if self.input_bits is None:
            return f"weight_bits={self.weight_bits}, input float, own forward"
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits}, grid={self.grid}, own forward"


def _kept(kind: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """Subclass of a kept layer and of the trained layer's class, whose forward looks as that of the latter does."""
    run = DeployedKeptLayer.forward
    forward = types.FunctionType(run.__code__, run.__globals__, run.__name__)
    return (DeployedKeptLayer, kind), {"forward": _seen_as(kind.forward)(forward)}


class DeployedOperand(nn.Module):
    """Quantizer of one operand of a product: step, bit-width and range of its whole codes.

    Args:
        step: units of the operand, one element, float32.
        bits: bit-width.
        grid: kind of grid.
        zero_point: levels below zero.
        code_range: lowest and highest code, counted from the zero point.
    """

    step: Tensor

    def __init__(
        self, step: Tensor, *, bits: int, grid: GridKind, zero_point: int, code_range: tuple[int, int]
    ) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().reshape(1))
        self.bits, self.grid, self.zero_point = bits, grid, zero_point
        self.code_low, self.code_high = code_range

    def codes(self, x: Tensor) -> Tensor:
        """Whole codes relative to the zero point, held as floats; shape of ``x``."""
        return integer_codes(x, self.step, self.code_low, self.code_high)

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`codes`."""
        return self.codes(x)

    def extra_repr(self) -> str:
        """Bit-width and grid."""
        return f"bits={self.bits}, grid={self.grid}"


class DeployedProduct(nn.Module):
    """A product inside attention: ``round(codes(x) @ codes(y)) * (step of x * step of y)``.

    Args:
        name: full name, for messages.
        x: the first operand.
        y: the second operand.
    """

    def __init__(self, name: str, x: DeployedOperand, y: DeployedOperand) -> None:
        super().__init__()
        self.name, self.x, self.y = name, x, y

    def operands(self) -> dict[str, DeployedOperand]:
        """Both operands by name."""
        return {"x": self.x, "y": self.y}

    def forward(self, x: Tensor, y: Tensor, drop: float = 0.0) -> Tensor:
        """The product, in the type of the first operand.

        Args:
            x: shape (..., n, k).
            y: shape (..., k, m).
            drop: must be 0.

        Returns:
            Shape (..., n, m).
        """
        refuse_dropout(self.name, drop)
        ranges = (self.x.code_low, self.x.code_high, self.y.code_low, self.y.code_high)
        return whole_product(self.x(x), self.y(y), self.x.step * self.y.step, *ranges).to(x.dtype)


#: The kinds of layer in a deployed model.
Deployed = DeployedLayer | DeployedWeightOnlyLayer


def take_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Split a call's arguments into the others and the input: the first argument, or the first tensor given by name."""
    if args:
        return args[1:], kwargs, args[0]
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return (), {key: value for key, value in kwargs.items() if key != name}, kwargs[name]


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the input changed: the first argument, or the first tensor given by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: change(kwargs[name])}


def deployed_layers(model: nn.Module) -> dict[str, Deployed]:
    """Deployed layers of a model by full name, each once, in the order of the model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Deployed)}


def check_deployed(model: nn.Module, command: str) -> None:
    """Refuse a model without deployed layers, in the name of the command that needs one.

    Raises:
        ConfigError: if there is no deployed layer.
    """
    if not deployed_layers(model):
        raise ConfigError(
            f"{command}: expected a deployed model, found a {type(model).__name__} without deployed layers. "
            "Call nipq.convert(model) first."
        )


def deployed_products(model: nn.Module) -> dict[str, DeployedProduct]:
    """Deployed products inside attention by full name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeployedProduct)}


def full_name(name: str, part: str) -> str:
    """``part`` of the module ``name``; the model itself has the empty name."""
    return f"{name}.{part}" if name else part


def become_(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another one in place: its class and all that it holds, but its hooks stay.

    Whatever refers to the module, under whatever name, in a list or a dict of Python's, has the other one from now on.

    Args:
        module: changed.
        other: not to be used afterwards.
    """
    kept = {key: vars(module)[key] for key in HOOKS if key in vars(module)}
    inside = vars(other) | kept
    vars(module).clear()
    module.__class__ = other.__class__
    vars(module).update(inside)
    for child in module._modules.values():  # what knew the other one
        if child is not None and "deployed_in" in vars(child):
            child.__dict__["deployed_in"] = (module,)


def deploy_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a deployed model without the layers' whole codes: scales, offsets, steps, and what stays float.

    A tensor with two names, be it a tied parameter or a module that stands in two places, is there once.
    """
    seen = {id(layer.weight_codes) for layer in deployed_layers(model).values()}
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[key] = value.detach() if isinstance(value, Tensor) else value
    return found
