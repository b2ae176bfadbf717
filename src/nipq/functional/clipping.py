"""Clipping ranges: alpha from its parameter, and alpha from data.

The functions that look at data are for calibration, not for a training step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nipq.errors import ConfigError, NonFiniteError
from nipq.functional.grid import Grid, levels

#: Least clipping range, in units of x. Quotients by the steps of a lesser one overflow float32, or its steps are 0.
LEAST_RANGE = 1e-30

#: Values of a tensor that calibration keeps; the squared error of a range is known to a per cent from far fewer.
SAMPLE_SIZE = 65_536


def even_stride(count: int, most: int) -> int:
    """Distance between elements of a flat tensor of which about ``most`` are kept, in all columns alike.

    The least stride of at least count / most that has no divisor in common with count. Every length of an axis divides
    count, so the kept elements walk through all places of every axis; a stride of 189 in rows of 27 would see the first
    column of each row and nothing else.

    Args:
        count: elements of the tensor.
        most: how many to keep, at least 1; as many or fewer are kept.

    Returns:
        1 or more.

    Example:
        >>> even_stride(8 * 27 * 27, 32), even_stride(100, 200)  # 183 would be a multiple of 3
        (185, 1)
    """
    stride = max(1, -(-count // most))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def alpha_from_raw(raw: Tensor) -> Tensor:
    """Clipping range alpha from its parameter.

    alpha = softplus(raw) = log(1 + e^raw); d alpha / d raw = sigmoid(raw). Computed in float64 and rounded once, so
    that every backend has the same number.

    Paper: the release; see docs/internals/paper-map.md.

    Args:
        raw: the parameter, any real number, any shape.

    Returns:
        alpha, > 0, shape of raw.

    Example:
        >>> alpha_from_raw(torch.tensor([6.0]))
        tensor([6.0025])
    """
    wide = raw if raw.device.type == "mps" else raw.double()  # Apple's GPUs have no float64
    return softplus(wide).to(raw.dtype)


def raw_from_alpha(alpha: Tensor) -> Tensor:
    """Parameter of a clipping range alpha, the inverse of ``alpha_from_raw``.

    raw = log(e^alpha - 1), computed as alpha + log(1 - e^-alpha), which neither overflows nor cancels.

    Paper: Q5 in docs/internals/paper-map.md.

    Args:
        alpha: clipping range, > 0, any shape.

    Returns:
        The parameter, shape of alpha.

    Raises:
        ConfigError: if a clipping range is not positive and finite.

    Example:
        >>> raw_from_alpha(torch.tensor([6.0025]))
        tensor([6.0000])
    """
    if not bool(((alpha > 0) & alpha.isfinite()).all()):
        raise ConfigError(
            f"expected positive, finite clipping ranges; found {float(alpha.min()):g} to {float(alpha.max()):g}. "
            "Calibrate on data that are not all zero, or set the clipping range by hand."
        )
    return alpha + torch.log(-torch.expm1(-alpha))


def spread_along(per_channel: Tensor, axis: int, ndim: int) -> Tensor:
    """Numbers of channels in a shape that broadcasts with a tensor.

    Args:
        per_channel: shape (1,) or (C,).
        axis: axis of the tensor along which the channels run.
        ndim: number of axes of the tensor.

    Returns:
        Shape (1,), or one with C along the axis and 1 elsewhere.
    """
    if per_channel.numel() == 1:
        return per_channel
    shape = [1] * ndim
    shape[axis] = -1
    return per_channel.reshape(shape)


@torch.no_grad()
def max_range(x: Tensor, grid: Grid, *, channel_axis: int | None = None) -> Tensor:
    """Smallest clipping range that truncates nothing.

    alpha = max |x| when signed, balanced or full, max x when unsigned, max x + shift when shifted. (On a full grid,
    whose high end lies a step inside, the largest positive values are truncated by that step.)

    Paper: the min-max start, Fig. 4 and T7 in docs/internals/paper-map.md.

    Args:
        x: data, any shape, not empty.
        grid: which levels.
        channel_axis: one clipping range for each index along this axis; one for all if left out.

    Returns:
        alpha, units of x, > 0, shape (1,) or (C,). 1 where the data have no extent (all zero), as any clipping range is
        right there and none can be told from the data.

    Raises:
        NonFiniteError: if x holds NaN or infinity.
        ConfigError: if x is empty.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> max_range(torch.tensor([-3.0, 1.0]), SIGNED)
        tensor([3.])
    """
    return _or_one(_extents(x, grid, channel_axis).amax(dim=1))


@torch.no_grad()
def noise_optimal_range(x: Tensor, bits: Tensor | float, grid: Grid, *, channel_axis: int | None = None) -> Tensor:
    """Clipping range at which the proxy's squared error on x is least, for uniform noise.

    The root of alpha P(in range) / (12 n^2) = E[(|x| - alpha)+], |x| standing for x when unsigned and for x + shift
    when shifted: widening the range gains as much at its ends as it loses by the coarser step. The left side
    rises and the right side falls with alpha, so there is one root. Between two neighbouring data points the
    equation is linear, hence the root is exact: alpha = sum of what lies beyond / (inside / (12 n^2) + beyond). On a
    full grid the high end is r alpha, r = (n - 1) / n, so a positive x counts as if it were x / r, r^2 times.

    Paper: section 5.2; T6 in docs/internals/paper-map.md. The same equation, with n for 2^(b-1), is OCTAV's (arXiv
    2206.06501).

    Args:
        x: data, any shape, not empty.
        bits: bit-width, >= 2, one number, or one for each channel.
        grid: which levels.
        channel_axis: one clipping range for each index along this axis; one for all if left out.

    Returns:
        alpha, units of x, > 0, shape (1,) or (C,); 1 where the data have no extent.

    Raises:
        NonFiniteError: if x holds NaN or infinity.
        ConfigError: if x is empty, or a bit-width is below 2.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> noise_optimal_range(torch.linspace(-1, 1, 101), torch.tensor([4.0]), SIGNED)
        tensor([0.9543])
    """
    n = levels(bits, grid).to(x.device, torch.float64).reshape(-1, 1)
    high_end = (n - 1) / n if grid.kind == "full" else torch.ones_like(n)
    points, order = _extents(x, grid, channel_axis, high_end).sort(dim=1)
    work = points.double()
    size = work.shape[1]
    weight = torch.ones_like(work)
    if grid.kind == "full":
        weight = torch.where(_rows(x, channel_axis).gather(1, order) > 0, high_end**2, weight)
    # Column k: alpha just below the k-th point, k points below it; on an unsigned grid those at zero get no noise.
    below = torch.arange(size, device=work.device, dtype=torch.float64)
    silent = 0 if grid.is_signed else (work <= 0).sum(dim=1, keepdim=True)
    noisy = (below - silent).clamp(min=0) / (12 * n**2)
    beyond = (work * weight).flip(1).cumsum(1).flip(1)
    slope = noisy + weight.flip(1).cumsum(1).flip(1)
    column = (work * slope >= beyond).to(torch.int8).argmax(dim=1, keepdim=True)  # the first that is true
    root = beyond.gather(1, column) / slope.gather(1, column)
    # The share in range jumps at a point; where the sign changes in the jump, that point is the answer.
    previous = torch.where(column > 0, work.gather(1, (column - 1).clamp(min=0)), 0)
    return _or_one(torch.maximum(root, previous).squeeze(1)).to(points.dtype)


def _rows(x: Tensor, channel_axis: int | None) -> Tensor:
    return x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)


def _extents(x: Tensor, grid: Grid, channel_axis: int | None, high_end: Tensor | None = None) -> Tensor:
    """Least alpha at which each element is not truncated, one row for each range; ``high_end`` in units of alpha."""
    if x.numel() == 0:
        raise ConfigError("expected data to find a range from, found an empty tensor. Calibrate on real inputs.")
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"expected finite data to find a range from, found {int((~x.isfinite()).sum())} of {x.numel()} elements "
            "NaN or infinite. Look for the layer or the input that produced them."
        )
    rows = _rows(x, channel_axis)
    if not grid.is_signed:
        return (rows + grid.shift).clamp(min=0)
    if grid.kind != "full" or high_end is None:
        return rows.abs()
    return torch.where(rows > 0, rows / high_end.to(rows.dtype), -rows)


def _or_one(alpha: Tensor) -> Tensor:
    return torch.where(alpha > 0, alpha, 1)
