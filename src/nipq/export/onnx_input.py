"""What the ONNX forms of a computed tensor share (a layer's input, an operand), and a product of two operands."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from nipq.export.modules import full_name
from nipq.export.onnx_graph import LayerForm, mark
from nipq.export.portable import PortableInput, PortableProduct
from nipq.nn.attention import refuse_dropout


class OnnxInput(LayerForm):
    """A computed tensor on its levels: a layer's input, or an operand of a product. It can be traced, not run.

    Args:
        name: full name of the layer or product.
        given: what becomes of the tensor; None when it stays float.
        part: which operand of a product it is; nothing of a layer.
    """

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, name: str, given: PortableInput | None, part: str = "") -> None:
        super().__init__()
        self.name, self.input, self.part = name, given, part

    @abstractmethod
    def register_input(self, given: PortableInput) -> None:
        """Keep as buffers what the format stores; after a layer's other ones, as the first of equal tensors names them.

        Args:
            given: what becomes of the tensor.
        """

    @abstractmethod
    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """The tensor on its levels, as operators of the format, its codes marked."""

    def trained(self) -> set[str]:
        """The step; a zero point only where the grid may be shifted."""
        if self.input is None:
            return set()
        return {"input_scale", "input_zero_point"} if self.input.grid == "shifted" else {"input_scale"}

    def on_levels(self, x: Tensor) -> Tensor:
        """The tensor on its levels, marked; as it is where it stays float."""
        return x if self.input is None else self.marked(self.quantized_input(x, self.input), "input")

    def marked(self, x: Tensor, role: str) -> Tensor:
        """A tensor named after what it is to the layer or to the operand."""
        return mark(x, self.name, full_name(self.part, role))


class OnnxProduct(LayerForm):
    """A product inside attention, about to be exported: both operands on their levels, multiplied as floats.

    Args:
        name: its full name.
        numbers: its operands.
        operand: what stands for each of them, made of the name, its numbers and which one it is.
    """

    def __init__(
        self, name: str, numbers: PortableProduct, operand: Callable[[str, PortableInput, str], OnnxInput]
    ) -> None:
        super().__init__()
        self.name = name
        self.x, self.y = (operand(name, numbers[part], part) for part in ("x", "y"))
        for part, form in (("x", self.x), ("y", self.y)):
            form.register_input(numbers[part])

    def trained(self) -> set[str]:
        """Those of both operands."""
        return {full_name(part, key) for part, form in (("x", self.x), ("y", self.y)) for key in form.trained()}

    def forward(self, x: Tensor, y: Tensor, drop: float = 0.0) -> Tensor:
        """The product as operators.

        Args:
            x: shape (..., n, k).
            y: shape (..., k, m).
            drop: must be 0.
        """
        refuse_dropout(self.name, drop)
        return mark(torch.matmul(self.x.on_levels(x), self.y.on_levels(y)), self.name, "output")
