"""Cost of a choice of bit-widths in one normal form: average bits, model size and bit-operations.

Average bits, model size and bit-operations all are a constant, plus a share for every weight tensor's bits, plus a
share for every activation's bits, plus a share for products of the two. Loss, report, feasible range and the ILP
solver all read the same form, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nipq.errors import ConfigError


@dataclass(frozen=True, eq=False)
class CostForm:
    """A cost as a function of bits: constant + weight . wb + activation . ab + product . (wb[layer] * ab).

    Args:
        constant: what does not depend on any bit-width, units of the cost.
        weight: cost of one bit of each weight tensor, shape (W,), float64.
        activation: cost of one bit of each layer's input, shape (L,), float64.
        product: cost of one bit times one bit in each layer, shape (L,), float64; for bit-operations, the layer's
            multiply-accumulates.
        weight_of_layer: which weight tensor each layer uses, shape (L,), whole numbers in 0..W-1; tied layers share.

    Raises:
        ConfigError: if the shapes or types do not fit together.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> CostForm(0.0, 0 * one, 0 * one, 10 * one, torch.tensor([0])).product
        tensor([10.], dtype=torch.float64)
    """

    constant: float
    weight: Tensor
    activation: Tensor
    product: Tensor
    weight_of_layer: Tensor

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        parts = (self.weight, self.activation, self.product)
        if any(part.dtype != torch.float64 for part in parts) or self.weight_of_layer.dtype != torch.int64:
            raise ConfigError(
                "expected float64 costs and an int64 weight_of_layer, as counts pass what float32 holds exactly; "
                f"found {[part.dtype for part in (*parts, self.weight_of_layer)]}. Convert them."
            )
        shapes = [tuple(part.shape) for part in (*parts, self.weight_of_layer)]
        if self.weight.dim() != 1 or len(set(shapes[1:])) != 1 or self.activation.dim() != 1:
            raise ConfigError(
                "expected weight of shape (W,) and activation, product and weight_of_layer of one shape (L,); "
                f"found {shapes}. Give one entry for each tensor."
            )

    def to(self, device: torch.device | str) -> CostForm:
        """The same form with its tensors on another device."""
        return CostForm(
            self.constant,
            self.weight.to(device),
            self.activation.to(device),
            self.product.to(device),
            self.weight_of_layer.to(device),
        )


def cost(form: CostForm, weight_bits: Tensor, activation_bits: Tensor) -> Tensor:
    """Cost of a choice of bits, soft or whole.

    constant + weight . wb + activation . ab + product . (wb[weight_of_layer] * ab).

    Paper: the average-bit and bit-operation targets; see docs/internals/paper-map.md; faults B3 and B4 there are what
    separate lists for weights and activations prevent.

    Args:
        form: what is counted.
        weight_bits: bits of each weight tensor, shape (W,).
        activation_bits: bits of each layer's input, shape (L,).

    Returns:
        The cost, float64, no dimensions, differentiable in both.

    Raises:
        ConfigError: if the bits do not have the shapes of the form.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> form = CostForm(0.0, 0 * one, 0 * one, 10 * one, torch.tensor([0]))
        >>> cost(form, torch.tensor([4.0]), torch.tensor([8.0]))
        tensor(320., dtype=torch.float64)
    """
    if weight_bits.shape != form.weight.shape or activation_bits.shape != form.activation.shape:
        raise ConfigError(
            f"expected {form.weight.numel()} weight and {form.activation.numel()} activation bit-widths; found shapes "
            f"{tuple(weight_bits.shape)} and {tuple(activation_bits.shape)}. Give one for each row of the cost form."
        )
    wb, ab = weight_bits.double(), activation_bits.double()
    shares = (form.weight * wb).sum() + (form.activation * ab).sum()
    return form.constant + shares + (form.product * wb[form.weight_of_layer] * ab).sum()
