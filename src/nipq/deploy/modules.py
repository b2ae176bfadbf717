"""A layer after training is over: whole weight codes, a step for its input, one multiply and one add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq.functional.grid import GridKind
from nipq.functional.uniform import integer_codes
from nipq.nn.integer import channel_dim, integer_forward, needs_float64, output_channels, weight_channel_axis


class DeployedLayer(nn.Module):
    """A convolution or linear layer on whole codes.

    ``y = round(layer(codes(x), weight)) * scale + offset`` with ``codes(x) = clamp(round(x / input_step), low, high)``
    counted from the zero point, so that padding with zeros pads with code 0. ``layer`` is the trained layer's own class
    and settings with integer weights and no bias; ``scale`` and ``offset`` hold steps, bias and the folded batch norm.

    Args:
        layer: an empty shell of the trained layer, see ``nipq.nn.layers.plain_shell``.
        weight: whole codes, int8 up to 8 bits and int16 above.
        scale: shape ``(channels,)``, float32; negative where a batch norm's gamma was.
        offset: shape ``(channels,)``, float32.
        input_step: step of the input, units of the input, one element, float32.
        weight_bits: bit-width of the weight.
        input_bits: bit-width of the input.
        grid: kind of the input's grid.
        zero_point: levels below zero.
        batchnorm: full name of the batch norm that was folded in, or None.
    """

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
    ) -> None:
        super().__init__()
        layer.register_buffer("weight", weight)
        self.layer = layer
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("input_step", input_step.reshape(1))
        self.weight_bits = weight_bits
        self.input_bits = input_bits
        self.grid = grid
        self.zero_point = zero_point
        # Numbers, not buffers: torch.export cannot read a buffer's value in a forward.
        self.code_low, self.code_high = code_range
        self.batchnorm = batchnorm
        self.float64 = needs_float64(weight, self.code_low, self.code_high, weight_channel_axis(layer))

    scale: Tensor
    offset: Tensor
    input_step: Tensor

    @property
    def weight(self) -> Tensor:
        """Whole weight codes."""
        codes = self.layer.weight
        assert isinstance(codes, Tensor)
        return codes

    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of the input relative to the zero point, held as floats; shape of ``x``."""
        return integer_codes(x.float(), self.input_step, self.code_low, self.code_high)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, float32."""
        return integer_forward(
            self._run, self.codes(x), self.weight, self.scale, self.offset, channel_dim(self.layer), self.float64
        )

    def _run(self, codes: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(self.layer, {"weight": weight}, (codes,))
        return result

    def extra_repr(self) -> str:
        """Bit-widths and grid."""
        folded = f", folded={self.batchnorm}" if self.batchnorm else ""
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits}, grid={self.grid}{folded}"


class DeployedWeightOnlyLayer(nn.Module):
    """A layer whose input stays float: the float layer with weight ``codes * scale``.

    Args:
        layer: an empty shell of the trained layer.
        weight: whole codes.
        scale: step of the weight, shape ``(channels,)`` or ``(1,)``, float32.
        bias: the layer's bias, or None.
        weight_bits: bit-width of the weight.
    """

    def __init__(
        self, layer: nn.Module, weight: Tensor, scale: Tensor, bias: Tensor | None, *, weight_bits: int
    ) -> None:
        super().__init__()
        layer.register_buffer("weight", weight)
        self.layer = layer
        self.register_buffer("scale", scale)
        self.register_buffer("offset", torch.zeros(output_channels(layer)) if bias is None else bias)
        self.has_bias = bias is not None
        self.weight_bits = weight_bits

    scale: Tensor
    offset: Tensor

    @property
    def weight(self) -> Tensor:
        """Whole weight codes."""
        codes = self.layer.weight
        assert isinstance(codes, Tensor)
        return codes

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        shape = [1] * self.weight.ndim
        shape[weight_channel_axis(self.layer)] = -1
        weight = self.weight.to(self.scale.dtype) * (self.scale.reshape(shape) if self.scale.numel() > 1 else self.scale)
        parts = {"weight": weight} | ({"bias": self.offset} if self.has_bias else {})
        result: Tensor = torch.func.functional_call(self.layer, parts, (x,))
        return result

    def extra_repr(self) -> str:
        """Bit-width."""
        return f"weight_bits={self.weight_bits}, input float"


#: The two kinds of layer in a deployed model.
Deployed = DeployedLayer | DeployedWeightOnlyLayer


def deployed_layers(model: nn.Module) -> dict[str, Deployed]:
    """Deployed layers by full name, each once.

    Args:
        model: what ``convert`` or ``load`` returned.

    Returns:
        Name -> layer, in the order of the model.
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Deployed)}


def full_name(name: str, part: str) -> str:
    """``part`` of the module ``name``; the model itself has the empty name."""
    return f"{name}.{part}" if name else part


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules wherever the old ones stand, under every name.

    Args:
        model: changed in place.
        replacements: old module -> new module.

    Returns:
        The model, or its replacement when it is itself replaced.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def deploy_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a deployed model without the layers' whole codes: scales, offsets, steps, and what stays float.

    Args:
        model: a deployed model.

    Returns:
        Tensor by name.
    """
    codes = {full_name(name, "layer.weight") for name in deployed_layers(model)}
    return {key: value for key, value in model.state_dict().items() if key not in codes}
