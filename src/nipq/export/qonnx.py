"""Layers and products that write themselves as QONNX ``Quant`` nodes, whose bit-width is data and needs no container.

``Quant(x, scale, zero, bits) = (round(clip(x / scale + zero)) - zero) * scale``. Weights are stored as float32 values
on their levels, as the format wants it. On a shifted grid a tie may be rounded to the other side than in the deployed
model, because the zero point is added before; all other grids agree.
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
from nipq.nn.kinds import along_channels


class QonnxInput(OnnxInput):
    """The QONNX form of a layer's input, or of an operand."""

    input_bits: Tensor

    def register_input(self, given: PortableInput) -> None:
        """Scale, zero point and bit-width, all as floats.

        Args:
            given: what becomes of the tensor.
        """
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("input_zero_point", torch.tensor(float(given.zero_point)))
        self.register_buffer("input_bits", torch.tensor(float(given.bits)))

    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """One Quant."""
        signed = given.grid == "signed"
        x = _quant(x, self.input_scale, self.input_zero_point, self.input_bits, signed=signed)
        return self.marked(x, "codes")


class QonnxLayer(OnnxLayer, QonnxInput):
    """The QONNX form of one deployed layer.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    weight_bits: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(layer, numbers, name)
        self.weight_scale = along_channels(numbers.weight_scale, self.shell, numbers.weight)
        self._buffers["weight"] = numbers.weight.float() * self.weight_scale
        self.register_buffer("weight_bits", torch.tensor(float(numbers.weight_bits)))
        self.register_buffer("weight_zero_point", torch.zeros(()))
        if numbers.input is not None:
            self.register_input(numbers.input)

    @property
    def weight(self) -> Tensor:
        """The weight as floats: the file holds levels."""
        return self.integers

    def dequantized_weight(self) -> Tensor:
        """One Quant."""
        return _quant(self.integers, self.weight_scale, self.weight_zero_point, self.weight_bits, signed=True)


def _quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, *, signed: bool) -> Tensor:
    attributes: dict[str, int | str] = {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"}
    kind = "qonnx.custom_op.general::Quant"
    return operator(kind, (x, scale, zero_point, bits), torch.float32, x.shape, attributes)


#: What stands for layers and products.
QONNX = Forms(QonnxLayer, partial(OnnxProduct, operand=QonnxInput))
