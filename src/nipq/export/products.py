"""Attention's products after training is over: a step for each operand, whole codes, one multiply."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nipq.functional.grid import GridKind
from nipq.functional.uniform import integer_codes
from nipq.nn.attention import refuse_dropout
from nipq.nn.integer import whole_product


class DeployedOperand(nn.Module):
    """How one operand becomes whole codes.

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
    """``round(codes(x) @ codes(y)) * (step of x * step of y)``.

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


def product_record(product: DeployedProduct) -> dict[str, dict[str, Any]]:
    """What the packed file's metadata say of a product; its steps are among the tensors.

    Args:
        product: a deployed product.
    """
    return {
        name: {"bits": operand.bits, "grid": operand.grid, "zero_point": operand.zero_point}
        for name, operand in product.operands().items()
    }


def deployed_products(model: nn.Module) -> dict[str, DeployedProduct]:
    """Deployed products by full name.

    Args:
        model: what ``convert`` or ``load`` returned.

    Returns:
        Name -> product, in the order of the model.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, DeployedProduct)}
