"""Modules of a deployed model: layers and products inside attention on whole codes, for inference.

A deployed layer holds whole weight codes and a step for its input; after the integer sums come one multiply and one
add. A deployed product holds a step for each operand; one multiply comes after its sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.functional.grid import GridKind
from nipq.functional.uniform import integer_codes
from nipq.nn.integer import integer_forward, needs_float64, refuse_dropout, whole_product
from nipq.nn.kinds import along_channels, channel_dim, close_shortcuts_, is_plain, is_table, weight_channel_axis


class _Deployed(nn.Module, ABC):
    """Base of both kinds of deployed layer.

    Args:
        layer: an empty shell of the trained layer, see ``nipq.nn.layers.plain_shell``.
        weight: whole codes, int8 up to 8 bits and int16 above; a buffer of the shell.
        weight_bits: bit-width of the weight.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
    """

    scale: Tensor

    def __init__(self, layer: nn.Module, weight: Tensor, weight_bits: int, tied_to: str | None) -> None:
        super().__init__()
        layer.register_buffer("weight", weight)
        self.layer = layer
        self.weight_bits = weight_bits
        self.tied_to = tied_to

    @property
    def weight_codes(self) -> Tensor:
        """Whole weight codes, int8 or int16."""
        codes = self.layer.weight
        assert isinstance(codes, Tensor)
        return codes

    @property
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at it (often at its type alone); nothing computes with it here."""
        codes = self.weight_codes
        return codes.to(self.scale.dtype) * along_channels(self.weight_scale, self.layer, codes)

    @property
    @abstractmethod
    def weight_scale(self) -> Tensor:
        """Step of the weight, units of the weight, one element or one for each channel."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (as torch's own)
        """Settings of the trained layer, such as ``in_features``, for models that look at them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            settings = vars(self._modules["layer"]) if "layer" in self.__dict__.get("_modules", {}) else {}
            if name.startswith("_") or name not in settings:
                raise
            return settings[name]

    @property
    def kind(self) -> str:
        """Class name of the trained layer."""
        return type(self.layer).__name__


class DeployedLayer(_Deployed):
    """A convolution or linear layer on whole codes.

    ``y = round(layer(codes(x), weight)) * scale + offset`` with ``codes(x) = clamp(round(x / input_step), low, high)``
    counted from the zero point, so that padding with zeros pads with code 0. ``layer`` is the trained layer's own class
    and settings with integer weights and no bias; ``scale`` and ``offset`` hold steps, bias and the folded batch norm.

    Args:
        layer: an empty shell of the trained layer.
        weight: whole codes.
        scale: shape ``(channels,)``, float32; negative where a batch norm's gamma was.
        offset: shape ``(channels,)``, float32.
        input_step: step of the input, units of the input, one element, float32.
        weight_bits: bit-width of the weight.
        input_bits: bit-width of the input.
        grid: kind of the input's grid.
        zero_point: levels below zero.
        code_range: lowest and highest code of the input, counted from the zero point.
        batchnorm: full name of the batch norm that was folded in, or None.
        tied_to: full name of the layer whose codes these are, or None when they are its own.
    """

    scale: Tensor
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
        input_bits: int,
        grid: GridKind,
        zero_point: int,
        code_range: tuple[int, int],
        batchnorm: str | None,
        tied_to: str | None = None,
    ) -> None:
        super().__init__(layer, weight, weight_bits, tied_to)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("input_step", input_step.reshape(1))
        self.input_bits = input_bits
        self.grid = grid
        self.zero_point = zero_point
        # Numbers, not buffers: torch.export cannot read a buffer's value in a forward.
        self.code_low, self.code_high = code_range
        self.batchnorm = batchnorm
        self.float64 = needs_float64(weight, self.code_low, self.code_high, weight_channel_axis(layer))

    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of the input relative to the zero point, held as floats; shape of ``x``."""
        return integer_codes(x, self.input_step, self.code_low, self.code_high)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer's output, float32.

        Args:
            *args: the trained layer's arguments, the input first.
            **kwargs: the same by name.
        """
        args, kwargs, x = take_input(args, kwargs)

        def run(codes: Tensor, weight: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(self.layer, {"weight": weight}, (codes, *args), kwargs)
            return result

        dim = channel_dim(self.layer)
        return integer_forward(run, self.codes(x), self.weight_codes, self.scale, self.offset, dim, self.float64)

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
        tied_to: full name of the layer whose codes these are, or None when they are its own.
    """

    scale: Tensor
    offset: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        weight_bits: int,
        tied_to: str | None = None,
    ) -> None:
        super().__init__(layer, weight, weight_bits, tied_to)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", bias)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer's output.

        Args:
            *args: the trained layer's arguments, the input first.
            **kwargs: the same by name.
        """
        if is_table(self.layer) and is_plain(
            self.layer
        ):  # look the codes up: a table is larger than the rows that are read
            rows, steps = (
                torch.func.functional_call(self.layer, {"weight": part}, args, kwargs)
                for part in (self.weight_codes, self.scale.reshape(-1, 1).expand(len(self.weight_codes), 1))
            )
            looked_up: Tensor = rows.to(steps.dtype) * steps
            return looked_up
        parts = {"weight": self.weight}
        if self.offset is not None:
            parts["bias"] = self.offset
        result: Tensor = torch.func.functional_call(self.layer, parts, args, kwargs)
        return result

    @property
    def weight_scale(self) -> Tensor:
        """``scale``."""
        return self.scale

    def extra_repr(self) -> str:
        """Bit-width."""
        return f"weight_bits={self.weight_bits}, input float"


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
        """The product, float32.

        Args:
            x: shape (..., n, k).
            y: shape (..., k, m).
            drop: must be 0.

        Returns:
            Shape (..., n, m).
        """
        refuse_dropout(self.name, drop)
        ranges = (self.x.code_low, self.x.code_high, self.y.code_low, self.y.code_high)
        return whole_product(self.x(x), self.y(y), self.x.step * self.y.step, *ranges)


#: The two kinds of layer in a deployed model.
Deployed = DeployedLayer | DeployedWeightOnlyLayer


def take_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Split a call's arguments into the others and the input: the first argument, or the first tensor given by name."""
    if args:
        return args[1:], kwargs, args[0]
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return (), {key: value for key, value in kwargs.items() if key != name}, kwargs[name]


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


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules wherever the old ones stand, under every name, in place.

    Returns:
        The model, or its replacement when it is itself replaced.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    close_shortcuts_(model)
    return replacements.get(model, model)


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
