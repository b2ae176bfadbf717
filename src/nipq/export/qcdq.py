"""Layers and products that write themselves as QuantizeLinear, integer Clip, DequantizeLinear.

Containers have 8 bits up to 8 bits and 16 above; Clip cuts them to the trained range. It stands after the
QuantizeLinear, on integers, where runtimes still see an integer layer. ONNX Runtime has no Clip for 16-bit integers, so
there the float is clipped to the same levels before; the codes are the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nipq.export.modules import Deployed
from nipq.export.onnx_graph import Forms, operator
from nipq.export.onnx_input import OnnxInput, OnnxProduct
from nipq.export.onnx_layer import OnnxLayer
from nipq.export.portable import PortableInput, PortableLayer
from nipq.nn.kinds import weight_channel_axis


class QcdqInput(OnnxInput):
    """The portable form of a layer's input, or of an operand."""

    low: Tensor
    high: Tensor

    def register_input(self, given: PortableInput) -> None:
        """Scale and zero point; limits where the container is wider than the range.

        Args:
            given: what becomes of the tensor.
        """
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("input_zero_point", torch.tensor(given.zero_point, dtype=given.dtype))
        if given.fills_container:
            return
        if given.bits > 8:
            low, high = ((code - given.zero_point) * given.scale for code in (given.low, given.high))
        else:
            low, high = (torch.tensor(code, dtype=given.dtype) for code in (given.low, given.high))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def trained(self) -> set[str]:
        """As in general; limits above 8 bits are floats, which follow the scale."""
        names = super().trained()
        return names | {"low", "high"} if self.input is not None and self.input.bits > 8 else names

    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """QuantizeLinear, Clip where the container is wider than the range, DequantizeLinear."""
        parameters = (self.input_scale, self.input_zero_point)
        clip = not given.fills_container
        if clip and given.bits > 8:
            x = operator("Clip", (x, self.low, self.high), x.dtype, x.shape)
        codes = operator("QuantizeLinear", (x, *parameters), given.dtype, x.shape)
        if clip and given.bits <= 8:
            codes = operator("Clip", (codes, self.low, self.high), given.dtype, x.shape)
        return operator("DequantizeLinear", (self.marked(codes, "codes"), *parameters), torch.float32, x.shape)


class QcdqLayer(OnnxLayer, QcdqInput):
    """The portable form of one deployed layer.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    one: Tensor

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(layer, numbers, name)
        # A grouped transposed convolution has its channels on two axes of the weight; DequantizeLinear scales one.
        grouped = weight_channel_axis(self.shell) == 1 and getattr(self.shell, "groups", 1) > 1
        self.scale_after = grouped and numbers.weight_scale.ndim > 0
        if self.scale_after:
            self.register_buffer("one", torch.ones(()))
        if numbers.input is not None:
            self.register_input(numbers.input)

    def dequantized_weight(self) -> Tensor:
        """DequantizeLinear of the integers."""
        scale = self.one if self.scale_after else self.weight_scale
        axis = {"axis": weight_channel_axis(self.shell)} if scale.ndim else None
        return operator("DequantizeLinear", (self.integers, scale), torch.float32, self.integers.shape, axis)


#: What stands for layers and products.
QCDQ = Forms(QcdqLayer, partial(OnnxProduct, operand=QcdqInput))
