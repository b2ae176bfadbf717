"""The true quantizer Q: round, truncate, and hand gradients straight through.

``integer_codes`` is the one evaluation rule. Every other part of the package that needs a code calls it: the formulas
``x * (1 / step)`` and ``round(clamp(x / alpha) * n)`` look alike and are different quantizers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nipq.functional.grid import Grid, code_range, step_size, value_range
from nipq.functional.truncation import truncation_gradients


def integer_codes(x: Tensor, step: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The codes of x: the evaluation rule of the whole package.

    code = clamp(round_half_even(x / step), low, high), with a true division. The value is code * step.

    Paper: the quantizer of section 3.

    Args:
        x: any shape, floating point.
        step: distance between levels, units of x, > 0, broadcastable to x.
        low: lowest code, broadcastable to x.
        high: highest code, broadcastable to x, same kind (tensor or number) as low.

    Returns:
        Whole numbers held in the wider of the two types of x and step, shape of x.

    Example:
        >>> integer_codes(torch.tensor([-9.0, 0.5, 1.5, 1.6]), torch.tensor([1.0]), -3, 3)
        tensor([-3.,  0.,  2.,  2.])
    """
    # A step without dimensions does not widen a half-precision x by itself, and x / step would be rounded twice.
    wide = x.to(torch.promote_types(x.dtype, step.dtype))
    return torch.clamp((wide / step).round_(), low, high)  # type: ignore[arg-type]  # numbers and tensors alike


def widened(x: Tensor) -> Tensor:
    """Half precision to float32, as steps and codes are not for rounding; anything else as it is.

    Args:
        x: any tensor.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class StraightThrough(torch.autograd.Function):
    """codes * step, with the gradient of a truncation; see ``quantize``.

    Written out because no sum of plain operations has both this gradient and *exactly* the value code * step. Keeps x
    only, and computes the error again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- torch documents no type for it
        x: Tensor,
        step: Tensor,
        lower: Tensor,
        upper: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> Tensor:
        """Values of the levels nearest to x."""
        ctx.save_for_backward(x, step, lower, upper, low, high)
        return (integer_codes(x, step, low, high) * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
        """The shared gradient, with the error for slope."""
        x, step, lower, upper, low, high = ctx.saved_tensors
        error = integer_codes(x, step, low, high) - x / step
        return *truncation_gradients(grad, x, error, (lower, upper), step, ctx.needs_input_grad), None, None


def quantize(x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """The nearest level inside the range, Q(x | alpha, bits), with straight-through gradients.

    Q = step * integer_codes(x). With the error e = (Q(x) - x) / step the gradients are those of LSQ::

        region                     d/dx    d/d alpha    d/d bits
        in range                   1       e / n        e * d step / d bits
        x >= alpha                 0       1            0
        x <= -alpha (signed)       0       -1           0
        x <= 0 (unsigned)          0       0            0

    On a shifted grid the whole zero point z is a constant: the ends -z step and alpha - z step have the derivatives
    -z/n and 1 - z/n in alpha, and -z d step / d bits in bits.

    Paper: the quantizer of section 3 and section 5.2; see docs/paper_map.md.

    Args:
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        Values on the grid, shape and type of x.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> from nipq.functional.grid import UNSIGNED
        >>> quantize(torch.tensor([-1.0, 0.9, 7.0]), torch.tensor([3.0]), torch.tensor([2.0]), UNSIGNED)
        tensor([0., 1., 3.])
    """
    step = step_size(alpha, bits, grid)
    lower, upper = value_range(alpha, bits, grid)
    low, high = code_range(alpha, bits, grid)
    out: Tensor = StraightThrough.apply(x, step, lower, upper, low.detach(), high.detach())
    return out
