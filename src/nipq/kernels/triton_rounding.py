"""The true quantizer on a GPU; the functions and the formulas are those of ``nipq.kernels.cpu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nipq.functional.grid import Grid
from nipq.kernels.arguments import laid_out_like
from nipq.kernels.triton_device import (
    along_rows,
    jit,
    on_device_of,
    places_of,
    put_sums,
    rounded,
    share_of,
    supported,
    tl,
)
from nipq.kernels.triton_scalars import KINDS, finish_kernel, range_of
from nipq.kernels.triton_tiles import tiling

__all__ = ["round_backward", "round_forward", "supported"]


def round_forward(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float) -> Tensor:
    """The true quantizer of ``nipq.functional.uniform``.

    Args:
        x: dense, float32, float16 or bfloat16.
        alpha: boundaries, float32, C numbers.
        bits: whole bit-width, float32, shape (1,).
        grid: which levels.
        channel_axis: axis of the boundaries.
        cap: what x is cut to before, infinity for nothing.

    Returns:
        Values on the grid, shape, type and layout of x.
    """
    y = torch.empty_like(x)
    tiles = tiling(x, alpha.numel(), channel_axis)
    with on_device_of(x):
        round_forward_kernel[tiles.grid](
            x, y, cap=float(cap), **_scalars(alpha, bits, grid), **tiles.arguments, **tiles.options
        )
    return y


def round_backward(
    grad: Tensor, x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`round_forward`.

    Args:
        grad: incoming gradient, shape of x.
        x: as given to it.
        alpha: as given to it.
        bits: as given to it.
        grid: as given to it.
        channel_axis: as given to it.
        cap: as given to it.

    Returns:
        The gradients of x, alpha and bits.
    """
    grad = laid_out_like(grad, x)
    dx, d_alpha, d_bits = torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(bits)
    tiles = tiling(x, alpha.numel(), channel_axis)
    sums = torch.empty(3, tiles.chunks, alpha.numel(), device=x.device)
    scalars = _scalars(alpha, bits, grid)
    with on_device_of(x):
        round_backward_kernel[tiles.grid](grad, x, dx, sums, **scalars, cap=cap, **tiles.arguments, **tiles.options)
        finish_kernel[(1,)](sums, d_alpha, d_bits, **_NO_PARAMETERS, **scalars, **tiles.sum_arguments, **tiles.options)
    return dx, d_alpha, d_bits


_NO_PARAMETERS = {
    "alpha_raw": None, "bit_raw": None, "bits_frozen": None, "key": None,
    "least": 0.0, "most": 0.0, "choices": (), "stochastic": False,
}  # fmt: skip


def _scalars(alpha: Tensor, bits: Tensor, grid: Grid) -> dict[str, Any]:
    return {"alpha": alpha, "bits": bits, "shift": float(grid.shift), "kind": KINDS[grid.kind]}


@jit
def code_of(quotient: tl.tensor, zero: tl.tensor, n: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Code of x / step, clamped before it is rounded: the ends are whole, so the order makes no difference."""
    low = -n if kind == 0 else -zero
    return rounded(tl.minimum(tl.maximum(quotient, low), n - zero))


@jit
def round_forward_kernel(
    x: tl.tensor, y: tl.tensor,
    alpha: tl.tensor, bits: tl.tensor, shift: tl.tensor, cap: tl.tensor, rows: tl.tensor, channels: tl.tensor,
    inner: tl.tensor, tiles: tl.tensor, tiles_inner: tl.tensor, share: tl.tensor, chunks: tl.tensor,
    kind: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr, tile_inner: tl.constexpr,
) -> None:  # fmt: skip
    """Codes times the step."""
    channel, _, start, stop = share_of(tiles, share, chunks, tile_channels)
    step, _, _, zero, n, _ = range_of(channel, channels, alpha, None, tl.load(bits), shift, kind)
    step, zero, n = along_rows(step), along_rows(zero), along_rows(n)
    for tile in range(start, stop):
        place, real = places_of(tile, channel, rows, channels, inner, tiles_inner, tile_rows, tile_inner)
        value = tl.load(x + place, mask=real, other=0).to(tl.float32)
        value = tl.where(value > cap, cap, value)
        level = code_of(tl.div_rn(value, step), zero, n, kind) * step
        tl.store(y + place, tl.where(value == value, level, value).to(y.dtype.element_ty), mask=real)


@jit
def round_backward_kernel(
    grad: tl.tensor, x: tl.tensor, dx: tl.tensor, sums: tl.tensor,
    alpha: tl.tensor, bits: tl.tensor, shift: tl.tensor, cap: tl.tensor, rows: tl.tensor, channels: tl.tensor,
    inner: tl.tensor, tiles: tl.tensor, tiles_inner: tl.tensor, share: tl.tensor, chunks: tl.tensor,
    kind: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr, tile_inner: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of x; of each program's share the sums of gradient * error inside, of gradient at either end."""
    channel, chunk, start, stop = share_of(tiles, share, chunks, tile_channels)
    step, lower, upper, zero, n, _ = range_of(channel, channels, alpha, None, tl.load(bits), shift, kind)
    step, lower, upper = along_rows(step), along_rows(lower), along_rows(upper)
    zero, n = along_rows(zero), along_rows(n)
    slopes = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    lowers = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    uppers = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    for tile in range(start, stop):
        place, real = places_of(tile, channel, rows, channels, inner, tiles_inner, tile_rows, tile_inner)
        g = tl.load(grad + place, mask=real, other=0).to(tl.float32)
        given = tl.load(x + place, mask=real, other=0).to(tl.float32)
        value = tl.where(given > cap, cap, given)
        inside = tl.where((value > lower) & (value < upper), g, 0.0)
        tl.store(dx + place, tl.where(given < cap, inside, 0.0).to(dx.dtype.element_ty), mask=real)
        quotient = tl.div_rn(value, step)
        slopes += inside * (code_of(quotient, zero, n, kind) - quotient)
        lowers += tl.where(value <= lower, g, 0.0)
        uppers += tl.where(value >= upper, g, 0.0)
    put_sums(sums, slopes, lowers, uppers, chunk, chunks, channel, channels)
