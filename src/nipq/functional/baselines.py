r"""Baselines (LSQ, LSQ+, PACT, DiffQ, STE) for the same quantizer: gradients differ in training, levels never do.

All methods, the noise proxy too, truncate and then add an error inside the range. They differ in that error, and in
what moves the clipping range::

    method   value in range    d / d alpha in range         clipping range
    nipq     x + noise step    noise / n                    learned
    lsq      Q(x)              (Q(x) - x) / alpha, scaled   learned by its step
    lsq+     Q(x)              the same                     learned, with an offset for inputs
    pact     Q(x)              0                            learned from what it truncates; weights: their moments
    diffq    x + noise step    -                            largest magnitude, nothing is truncated
    ste      Q(x)              -                            stays where calibration put it
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nipq.functional.grid import Grid, code_range, levels, step_size, value_range
from nipq.functional.uniform import StraightThrough, quantize

#: Least slope of the softplus for which LSQ's factor makes up: below it a clipping range, near 0, would jump.
LEAST_SLOPE = 0.01

#: Momentum of the running largest magnitude of an input.
RUNNING_MAX_MOMENTUM = 0.1

#: Coefficients of ``sawb_range`` by bit-width: least squares of the best clipping range of six distributions.
SAWB = {2: (2.542, 1.623), 3: (6.952, 6.316), 4: (11.798, 11.830), 5: (16.653, 17.481), 6: (21.147, 22.756)}


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor; value * factor / factor would not be the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:  # noqa: ANN401 -- torch documents no type for it
        """The value."""
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 -- as above
        """The scaled gradient."""
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def _slope(alpha: Tensor) -> Tensor:
    """Derivative of a softplus, from its value alpha."""
    return (-torch.expm1(-alpha.detach())).clamp_min(LEAST_SLOPE)


def lsq_quantize(
    x: Tensor,
    alpha: Tensor,
    bits: Tensor,
    grid: Grid,
    count: int,
    quantizer: Callable[[Tensor, Tensor, Tensor, Grid], Tensor] = quantize,
) -> Tensor:
    r"""The true quantizer whose clipping range moves as LSQ's learned step does.

    LSQ learns the step s = alpha / n and scales its gradient by g = 1 / sqrt(count n). Here the parameter is alpha_raw
    with alpha = softplus(alpha_raw). A gradient step of LSQ moves alpha = n s by -lr g n^2 dL/d alpha; one on
    alpha_raw moves it by -lr sigmoid(alpha_raw)^2 dL/d alpha. So the gradient of alpha is multiplied by::

        n^2 / (sqrt(count n) (1 - e^-alpha)^2)          as sigmoid(alpha_raw) = 1 - e^-alpha

    and a small step of plain gradient descent, with any momentum, is LSQ's. (For alpha below 0.01 the factor stays what
    it is there.)

    Paper: LSQ (arXiv 1902.08153), sections 2.1 and 2.2; its activations' count is features of one sample.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x, the softplus of a parameter.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        count: elements that share one clipping range: of a weight, or of one sample of an input.
        quantizer: ``quantize``, or the fused kernel of it.

    Returns:
        Values on the grid, shape and type of x.

    Raises:
        ConfigError: if any bit-width is below 2.
    """
    n = levels(bits.detach(), grid)
    highest = n - 1 if grid.kind == "full" else n
    slope = _slope(alpha)
    factor = n * n / (torch.sqrt(count * highest) * slope * slope)
    scaled: Tensor = _ScaleGradient.apply(alpha, factor)
    return quantizer(x, scaled, bits, grid)


def lsq_range(x: Tensor, bits: Tensor | float, grid: Grid, *, channel_axis: int | None = None) -> Tensor:
    """LSQ's first clipping range: n steps of 2 E|x| / sqrt(highest level), which is n but for full grids.

    Paper: LSQ (arXiv 1902.08153), section 2.1.

    Args:
        x: data, any shape, not empty.
        bits: bit-width, >= 2.
        grid: which levels.
        channel_axis: one clipping range for each index along this axis; one for all if left out.

    Returns:
        alpha, units of x, > 0, shape (1,) or (C,); 1 where the data are all zero.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> lsq_range(torch.tensor([-1.0, 1.0]), 2, SIGNED)
        tensor([2.])
    """
    rows = x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)
    n = levels(bits, grid).to(x)
    alpha = 2 * rows.abs().mean(dim=1) * n / torch.sqrt(n - 1 if grid.kind == "full" else n)
    return torch.where(alpha > 0, alpha, 1)


def quantize_with_offset(x: Tensor, alpha: Tensor, offset: Tensor, bits: Tensor, count: int) -> Tensor:
    r"""LSQ+ for inputs: a range of length alpha whose low end is learned as well.

    The code of zero is the whole number z = round(-offset / step), in 0..n, so that the result is on the same grid as
    ``Grid("shifted", -offset)``; offsets above 0 count as 0. With the ends offset and offset + alpha::

        region             d/dx    d/d alpha           d/d offset
        in range           1       (Q(x) - x)/alpha    0
        above              0       1                   1
        below              0       0                   1

    and LSQ's factors on alpha (see ``lsq_quantize``) and 1 / sqrt(count n) on the offset.

    Paper: LSQ+ (arXiv 2004.09576), Eq. 1 to 4; there the offset is not on the grid.

    Args:
        x: any shape, floating point.
        alpha: length of the range, units of x, > 0, shape (1,).
        offset: low end of the range, units of x, <= 0, shape (1,).
        bits: bit-width, >= 2, shape (1,).
        count: elements of one sample.

    Returns:
        Values on the grid, shape and type of x.
    """
    grid = Grid("shifted")
    n = levels(bits.detach(), grid)
    slope = _slope(alpha)
    g = 1 / torch.sqrt(count * n)
    alpha = _ScaleGradient.apply(alpha, g * n * n / (slope * slope))
    step = step_size(alpha, bits, grid)
    with torch.no_grad():
        zero = torch.minimum(torch.round(-offset / step).clamp_min(0), n)
    low = _ScaleGradient.apply(offset, g).clamp(max=0)
    lower = low + (-zero * step - low).detach()  # where the whole code of zero puts it, moved by the offset
    upper = lower + alpha
    out: Tensor = StraightThrough.apply(x, step, lower, upper, -zero, n - zero)
    return out


def pact_quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> Tensor:
    r"""PACT: the clipping range learns from the values that it truncates, and from no other.

    d/d alpha is 1 where x >= alpha, -1 where x <= -alpha (signed), 0 in range; d/dx is 1 in range, 0 outside. The
    bit-width gets no gradient. PACT's decay of alpha is a weight decay on the clipping ranges.

    Paper: PACT (arXiv 1805.06085), Eq. 3.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha; gets no gradient.
        grid: which levels.

    Returns:
        Values on the grid, shape and type of x.
    """
    bits = bits.detach()
    lower, upper = value_range(alpha, bits, grid)
    low, high = code_range(alpha.detach(), bits, grid)
    step = step_size(alpha, bits, grid).detach()
    out: Tensor = StraightThrough.apply(x, step, lower, upper, low, high, grid.level_offset)
    return out


def sawb_range(x: Tensor, bits: int, *, channel_axis: int | None = None) -> Tensor:
    """Clipping range of a weight from its two first moments, as PACT's authors choose it.

    alpha = c1 sqrt(E w^2) - c2 E|w|, at most max |w|, with c1 and c2 by bit-width. The coefficients are fitted, as in
    the paper, to the clipping ranges of least squared error of six distributions (normal, uniform, Laplace, logistic,
    triangular, von Mises), but for our grid, which has a level at zero and 2^b - 1 levels. Above 6 bits max |w|.

    Paper: SAWB (arXiv 1807.06964), section 3.

    Args:
        x: a weight, any shape, not empty.
        bits: whole bit-width, >= 2.
        channel_axis: one clipping range for each index along this axis; one for all if left out.

    Returns:
        alpha, units of x, > 0, shape (1,) or (C,); 1 where the weight is all zero.
    """
    rows = x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)
    largest = rows.abs().amax(dim=1)
    if bits not in SAWB:
        return torch.where(largest > 0, largest, 1)
    c1, c2 = SAWB[bits]
    alpha = c1 * rows.square().mean(dim=1).sqrt() - c2 * rows.abs().mean(dim=1)
    # A tensor with one magnitude everywhere, or nearly so, is best covered whole; the line may even go below zero.
    alpha = torch.where(alpha > 0, torch.minimum(alpha, largest), largest)
    return torch.where(alpha > 0, alpha, 1)


def untruncated_proxy(x: Tensor, alpha: Tensor, bits: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """DiffQ's pseudo-quantization: noise everywhere, truncation nowhere.

    x + noise * step with step = alpha / n, alpha the largest magnitude; d/dx = 1, d/d bits = noise * d step / d bits.

    Paper: DiffQ (arXiv 2104.09987), Eq. 5 and 6; here with the symmetric grid of the other methods.

    Args:
        x: any shape, floating point.
        alpha: largest magnitude, units of x, > 0, broadcastable to x; gets no gradient.
        bits: bit-width, >= 2, broadcastable to alpha.
        noise: units of the step, shape of x; gets no gradient.
        grid: which levels.

    Returns:
        The noisy values, shape and type of x.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> x, noise = torch.tensor([0.2, 3.0]), torch.tensor([0.25, 0.5])
        >>> untruncated_proxy(x, torch.tensor([3.0]), torch.tensor([3.0]), noise, SIGNED)
        tensor([0.4500, 3.5000])
    """
    return x + noise * step_size(alpha.detach(), bits, grid)


def running_range(alpha: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """DiffQ for inputs: the running mean of the largest magnitudes, alpha + momentum (max - alpha).

    Args:
        alpha: the present one, shape (1,).
        x: the input.
        grid: which levels; on a shifted grid the range also covers the shift.

    Returns:
        The new clipping range, > 0, shape (1,).
    """
    largest = x.abs().amax() if grid.is_signed else x.amax() + grid.shift
    return (alpha + RUNNING_MAX_MOMENTUM * (largest - alpha)).clamp_min(math.ulp(1.0))
