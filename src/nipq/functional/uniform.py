"""The true quantizer (uniform quantization): truncation, integer codes, and straight-through gradients.

``integer_codes`` is the one evaluation rule. Every other part of the package that needs a code calls it: the formulas
``x * (1 / step)`` and ``round(clamp(x / alpha) * n)`` look alike and are different quantizers.

Truncation and its gradients are those of the noise proxy as well. They are in the training path, so the masks are
numbers 0 and 1 and are multiplied. ``torch.where`` and boolean masks say the same, but on a CPU they cost ten times as
much: one mispredicted branch an element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nipq.functional.grid import Grid, code_range, step_size, value_range


class Gradients(NamedTuple):
    """Gradients of the arguments of a truncation; None where none was asked for."""

    x: Tensor | None
    step: Tensor | None
    lower: Tensor | None
    upper: Tensor | None


def truncate(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Values of x, or the nearer end of the range.

    min(max(x, lower), upper).

    Paper: the quantizer of section 3.

    Args:
        x: any shape.
        lower: low end, units of x, broadcastable to x.
        upper: high end, units of x, broadcastable to x.

    Returns:
        Truncated values, shape of x.

    Example:
        >>> truncate(torch.tensor([-1.0, 1.0, 9.0]), torch.tensor([0.0]), torch.tensor([6.0]))
        tensor([0., 1., 6.])
    """
    return torch.clamp_min(x, lower).clamp_max_(upper)


def inside_range(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """1 strictly inside the range, 0 elsewhere.

    An element on either end is not inside: a ReLU's zeros get no noise and pass no gradient.

    Paper: the release; see docs/internals/paper-map.md.

    Args:
        x: any shape.
        lower: low end, units of x, broadcastable to x.
        upper: high end, units of x, broadcastable to x.

    Returns:
        Zeros and ones, shape and type of x, without gradient; a new tensor, free to be written to.

    Example:
        >>> inside_range(torch.tensor([0.0, 1.0, 6.0]), torch.tensor([0.0]), torch.tensor([6.0]))
        tensor([0., 1., 0.])
    """
    x = x.detach()
    return x.clone().lt_(upper).mul_(x.clone().gt_(lower))


def truncation_gradients(
    grad: Tensor, x: Tensor, slope: Tensor, ends: tuple[Tensor, Tensor], step: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of x + slope * step inside the range, and of its ends outside.

    With slope = (Q(x) - x) / step this is LSQ, with slope = noise it is the proxy; that this is the only difference
    is the content of the paper's section 5.2. An element on an end counts as truncated.

    Paper: section 5.2; see docs/internals/paper-map.md.

    Args:
        grad: incoming gradient, shape of x.
        x: what was truncated.
        slope: derivative of the result in the step, shape of x.
        ends: (lower, upper), broadcastable to x.
        step: distance between levels, broadcastable to x.
        needs: whether the gradient of x, step, lower, upper is wanted.

    Returns:
        The four gradients, each of the shape and type of its argument.
    """
    lower, upper = ends
    inside = inside_range(x, lower, upper).mul_(grad)
    return Gradients(
        x=inside if needs[0] else None,
        step=(inside * slope).sum_to_size(step.shape).to(step.dtype) if needs[1] else None,
        lower=_total(x.detach().clone().le_(lower), grad, lower) if needs[2] else None,
        upper=_total(x.detach().clone().ge_(upper), grad, upper) if needs[3] else None,
    )


def _total(mask: Tensor, grad: Tensor, end: Tensor) -> Tensor:
    return mask.mul_(grad).sum_to_size(end.shape).to(end.dtype)


def integer_codes(
    x: Tensor, step: Tensor, low: Tensor | float, high: Tensor | float, *, level_offset: float = 0.0
) -> Tensor:
    """The codes of x: the evaluation rule of the whole package.

    code = clamp(round_half_even(x / step), low, high), with a true division. The value is code * step. On a balanced
    grid, whose levels lie half a step beside, code = clamp(floor(x / step) + 1/2, low, high).

    Paper: the quantizer of section 3.

    Args:
        x: any shape, floating point.
        step: distance between levels, units of x, > 0, broadcastable to x.
        low: lowest code, broadcastable to x.
        high: highest code, broadcastable to x, same kind (tensor or number) as low.
        level_offset: :attr:`nipq.functional.grid.Grid.level_offset`, 0 or 1/2.

    Returns:
        Whole numbers, or halves with a level offset, held in the wider of the two types of x and step, shape of x.

    Example:
        >>> integer_codes(torch.tensor([-9.0, 0.5, 1.5, 1.6]), torch.tensor([1.0]), -3, 3)
        tensor([-3.,  0.,  2.,  2.])
    """
    # A step without dimensions does not widen a half-precision x by itself, and x / step would be rounded twice.
    wide = x.to(torch.promote_types(x.dtype, step.dtype))
    codes = (wide / step).floor_().add_(level_offset) if level_offset else (wide / step).round_()
    return torch.clamp(codes, low, high)  # type: ignore[arg-type]  # numbers and tensors alike


def widened(x: Tensor) -> Tensor:
    """Half precision to float32, as steps and codes are not for rounding; anything else as it is.

    Args:
        x: any tensor.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class StraightThrough(torch.autograd.Function):
    """Straight-through estimator: codes * step, with the gradient of a truncation; see ``quantize``.

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
        level_offset: float = 0.0,
    ) -> Tensor:
        """Values of the levels nearest to x."""
        ctx.save_for_backward(x, step, lower, upper, low, high)
        ctx.level_offset = level_offset
        return (integer_codes(x, step, low, high, level_offset=level_offset) * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
        """The gradients of a truncation, with the rounding error for slope."""
        x, step, lower, upper, low, high = ctx.saved_tensors
        # Outside of the range it counts for nothing, be it infinite or not a number.
        error = (integer_codes(x, step, low, high, level_offset=ctx.level_offset) - x / step).nan_to_num_(0, 0, 0)
        return *truncation_gradients(grad, x, error, (lower, upper), step, ctx.needs_input_grad), None, None, None


def quantize(x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """The nearest level inside the range, Q(x | alpha, bits), with straight-through gradients.

    Q = step * integer_codes(x). With the error e = (Q(x) - x) / step the gradients are those of LSQ::

        region                     d/dx    d/d alpha    d/d bits
        in range                   1       e / n        e * d step / d bits
        x >= alpha                 0       1            0
        x <= -alpha (signed)       0       -1           0
        x <= 0 (unsigned)          0       0            0
        x is not a number          0       0            0

    On a full grid the high end alpha - step moves by 1 - 1/n with alpha. An x whose quotient by the step overflows is
    outside, too. On a shifted grid the whole zero point z is a constant: the ends -z step and alpha - z step have the
    derivatives -z/n and 1 - z/n in alpha, and -z d step / d bits in bits.

    Paper: the quantizer of section 3 and section 5.2; see docs/internals/paper-map.md.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
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
    out: Tensor = StraightThrough.apply(x, step, lower, upper, low.detach(), high.detach(), grid.level_offset)
    return out
