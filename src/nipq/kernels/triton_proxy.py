"""The noise proxy on a GPU: one launch forward, two backward, nothing kept but the result.

The functions are those of ``nipq.kernels.cpu``, and so are the formulas. Everything that changes from step to step is
read from the device's memory, so no launch waits for the device and all of them can be recorded in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nipq.kernels.arguments import ProxySettings, ProxyTensors, laid_out_like
from nipq.kernels.triton_device import (
    along_rows,
    halves_of,
    jit,
    noise_times,
    on_device_of,
    places_of,
    put_sums,
    share_of,
    supported,
    tl,
)
from nipq.kernels.triton_scalars import KINDS, bits_of, finish_kernel, range_of
from nipq.kernels.triton_tiles import tiling

__all__ = ["proxy_backward", "proxy_forward", "supported"]


def proxy_forward(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The noise proxy of ``nipq.functional.proxy``.

    Args:
        x: dense, float32, float16 or bfloat16.
        tensors: boundary, bits and key.
        settings: grid and range of bits.

    Returns:
        The proxy, shape, type and layout of x.
    """
    y = torch.empty_like(x)
    scalars = _scalars(tensors, settings)
    tiles = tiling(x, tensors.alpha_raw.numel(), settings.channel_axis)
    with on_device_of(x):
        proxy_forward_kernel[tiles.grid](
            x, y, **_noise(tensors, settings), **scalars, **tiles.arguments, **tiles.options
        )  # fmt: skip
    return y


def proxy_backward(
    grad: Tensor, y: Tensor, tensors: ProxyTensors, settings: ProxySettings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`proxy_forward`, from its result.

    Args:
        grad: incoming gradient, shape of y.
        y: what it returned.
        tensors: as given to it.
        settings: as given to it.

    Returns:
        The gradients of x, of alpha_raw, and of bit_raw where there is one.
    """
    grad = laid_out_like(grad, y)
    dx, d_alpha_raw = torch.empty_like(y), torch.empty_like(tensors.alpha_raw)
    d_bit_raw = None if tensors.bit_raw is None else torch.empty_like(tensors.bit_raw)
    tiles = tiling(y, tensors.alpha_raw.numel(), settings.channel_axis)
    sums = torch.empty(3, tiles.chunks, tiles.size[1], device=y.device)
    scalars = _scalars(tensors, settings)
    with on_device_of(y):
        proxy_backward_kernel[tiles.grid](
            grad, y, dx, sums, **_noise(tensors, settings), **scalars, **tiles.arguments, **tiles.options
        )  # fmt: skip
        finish_kernel[(1,)](sums, d_alpha_raw, d_bit_raw, **scalars, **tiles.sum_arguments, **tiles.options)
    return dx, d_alpha_raw, d_bit_raw


def _noise(tensors: ProxyTensors, settings: ProxySettings) -> dict[str, Any]:
    """What a kernel takes for the elements besides."""
    return {
        "table": tensors.table, "table_count": tensors.table_count,
        "cap": float(settings.cap), "capped": settings.cap < math.inf,
    }  # fmt: skip


def _scalars(tensors: ProxyTensors, settings: ProxySettings) -> dict[str, Any]:
    """What a kernel takes that does not depend on the elements."""
    return {
        "alpha": None, "alpha_raw": tensors.alpha_raw, "key": tensors.key,
        "bit_raw": tensors.bit_raw, "bits_frozen": tensors.bits_frozen, "bits": tensors.bits,
        "least": float(settings.low), "most": float(settings.high), "choices": settings.choices,
        "stochastic": settings.stochastic, "kind": KINDS[settings.grid.kind], "shift": float(settings.grid.shift),
    }  # fmt: skip


@jit
def count_of(table: tl.tensor, table_count: tl.tensor) -> tl.tensor:
    """How many errors there are to draw from."""
    count = tl.full([], 0, tl.uint32)
    if table is not None:
        count = tl.load(table_count).to(tl.uint32)
    return count


@jit
def inward(end: tl.tensor, by: tl.constexpr) -> tl.tensor:
    """The next number of the type above (by = 1) or below (by = -1) an end; next to 0 a normal one, if it is wide.

    An in-range result that falls on an end moves there, so that backward can tell it from a truncated one.
    """
    number = end.to(tl.int32 if end.dtype == tl.float32 else tl.int16, bitcast=True)
    smallest = 5.960464477539063e-08 if end.dtype == tl.float16 else 1.1754943508222875e-38
    wide = end.to(tl.float32)
    next_to = tl.where(wide > 0, number + by, number - by).to(end.dtype, bitcast=True)
    return tl.where(wide == 0, by * smallest, next_to.to(tl.float32))


@jit
def ends_of(lower: tl.tensor, upper: tl.tensor, element: tl.constexpr) -> tl.tensor:
    """Ends as the type has them, and their neighbours inside, ready to meet the elements."""
    low, up = lower.to(element), upper.to(element)
    stored_low, stored_up = along_rows(low.to(tl.float32)), along_rows(up.to(tl.float32))
    return stored_low, stored_up, along_rows(inward(low, 1)), along_rows(inward(up, -1))


@jit
def with_noise(
    value: tl.tensor, noise: tl.tensor, lower: tl.tensor, upper: tl.tensor, after_lower: tl.tensor,
    before_upper: tl.tensor, element: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """An in-range value with its noise, rounded to the type, off the ends."""
    noisy = (value + noise).to(element).to(tl.float32)
    noisy = tl.where(noisy == lower, after_lower, noisy)
    return tl.where(noisy == upper, before_upper, noisy)


@jit
def proxy_forward_kernel(
    x: tl.tensor, y: tl.tensor,
    alpha: tl.tensor, alpha_raw: tl.tensor, bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor,
    shift: tl.tensor, key: tl.tensor, table: tl.tensor, table_count: tl.tensor, cap: tl.tensor,
    rows: tl.tensor, channels: tl.tensor, inner: tl.tensor,
    tiles: tl.tensor, tiles_inner: tl.tensor, share: tl.tensor, chunks: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr, kind: tl.constexpr,
    capped: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr, tile_inner: tl.constexpr,
) -> None:  # fmt: skip
    """Noise inside the range, the nearer end outside."""
    channel, _, start, stop = share_of(tiles, share, chunks, tile_channels)
    low, high = halves_of(key)
    count = count_of(table, table_count)
    whole = bits_of(bit_raw, bits_frozen, bits, key, least, most, choices, stochastic)
    step, lower, upper, _, _, _ = range_of(channel, channels, alpha, alpha_raw, whole, shift, kind)
    element: tl.constexpr = x.dtype.element_ty
    low_end, up_end, after_low, before_up = ends_of(lower, upper, element)
    cutting = tl.max((cap < upper).to(tl.int32), 0) > 0
    step, lower, upper = along_rows(step), along_rows(lower), along_rows(upper)
    for tile in range(start, stop):
        place, real = places_of(tile, channel, rows, channels, inner, tiles_inner, tile_rows, tile_inner)
        value = tl.load(x + place, mask=real, other=0).to(tl.float32)
        noise = noise_times(step, tile, place, low, high, table, count, tile_channels == 1)
        result = with_noise(value, noise, low_end, up_end, after_low, before_up, element)
        result = tl.where(value >= upper, up_end, result)
        if capped and cutting:  # at the cap and beyond: the cap with noise; below it, what lands there moves down
            highest = with_noise(cap, noise, low_end, up_end, after_low, before_up, element)
            below_cap = tl.where(result == highest, inward(result.to(element), -1), result)
            result = tl.where(cap < upper, tl.where(value >= cap, highest, below_cap), result)
        result = tl.where(value <= lower, low_end, result)
        tl.store(y + place, result.to(element), mask=real)


@jit
def proxy_backward_kernel(
    grad: tl.tensor, y: tl.tensor, dx: tl.tensor, sums: tl.tensor,
    alpha: tl.tensor, alpha_raw: tl.tensor, bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor,
    shift: tl.tensor, key: tl.tensor, table: tl.tensor, table_count: tl.tensor, cap: tl.tensor,
    rows: tl.tensor, channels: tl.tensor, inner: tl.tensor,
    tiles: tl.tensor, tiles_inner: tl.tensor, share: tl.tensor, chunks: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr, kind: tl.constexpr,
    capped: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr, tile_inner: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of x; of each program's share the sums of gradient * noise inside, of gradient at either end."""
    channel, chunk, start, stop = share_of(tiles, share, chunks, tile_channels)
    low, high = halves_of(key)
    count = count_of(table, table_count)
    whole = bits_of(bit_raw, bits_frozen, bits, key, least, most, choices, stochastic)
    step, lower, upper, _, _, _ = range_of(channel, channels, alpha, alpha_raw, whole, shift, kind)
    element: tl.constexpr = y.dtype.element_ty
    low_end, up_end, after_low, before_up = ends_of(lower, upper, element)
    cutting = tl.max((cap < upper).to(tl.int32), 0) > 0
    unit, cuts = along_rows(step * (1.0 / 65536)), along_rows(cap < upper)
    slopes = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    lowers = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    uppers = tl.zeros([tile_rows, tile_channels, tile_inner], tl.float32)
    for tile in range(start, stop):
        place, real = places_of(tile, channel, rows, channels, inner, tiles_inner, tile_rows, tile_inner)
        g = tl.load(grad + place, mask=real, other=0).to(tl.float32)
        value = tl.load(y + place, mask=real, other=0).to(tl.float32)
        noise = noise_times(65536.0, tile, place, low, high, table, count, tile_channels == 1)
        below, above = value == low_end, value == up_end
        inside = tl.where(below | above, 0.0, g)
        passed = inside
        if capped and cutting:
            highest = with_noise(cap, noise * unit, low_end, up_end, after_low, before_up, element)
            passed = tl.where(cuts & (value == highest), 0.0, inside)
        tl.store(dx + place, passed.to(dx.dtype.element_ty), mask=real)
        slopes += inside * noise
        lowers += tl.where(below, g, 0.0)
        uppers += tl.where(above, g, 0.0)
    put_sums(sums, slopes * (1.0 / 65536), lowers, uppers, chunk, chunks, channel, channels)
