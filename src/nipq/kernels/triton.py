"""Triton kernels for GPUs: the noise proxy and the true quantizer, one launch forward and two backward.

The functions and the formulas are those of ``nipq.kernels.cpu``. Everything that changes from step to step (bit-width,
clipping ranges, key) is read from the device's memory and computed in every program, so nothing has to run before, no
launch waits for the device, and all of them can be recorded in a CUDA graph. The noise proxy saves its result alone.

Importable without Triton; the kernels are then functions that are never called. What stands under ``@jit`` runs on the
device, or on the CPU in Triton's interpreter, where the tests hold it to the plain maths. Two rules keep it equal to
torch bit for bit: no multiply and add fused into one (``Tiling.options``), and true divisions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from nipq.functional.counter_rng import is_dense
from nipq.functional.grid import Grid
from nipq.kernels.arguments import GRID_NUMBERS, ProxySettings, ProxyTensors, laid_out_like
from nipq.kernels.triton_tiles import tiling

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

#: Oldest generation of NVIDIA's that Triton compiles for, and the first with bfloat16.
GENERATION, BFLOAT16_GENERATION = (7, 0), (8, 0)

#: Types of elements that the kernels take.
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401 -- Triton ships no types
    """Compile a function for the device by ``triton.jit``; without Triton it stays as it is."""
    return triton.jit(function) if triton else function


def supported(x: Tensor, alpha: Tensor, channel_axis: int) -> bool:  # noqa: ARG001 -- any axis will do
    """Return whether there is a kernel for such a tensor.

    Args:
        x: what is to be quantized.
        alpha: its clipping range, or the parameter of it.
        channel_axis: axis of the clipping ranges.
    """
    return (
        triton is not None
        and x.dtype in TYPES
        and alpha.dtype == torch.float32
        and (alpha.numel() == 1 or is_dense(x))
        and (_suits(x.device, x.dtype) if x.device.type == "cuda" else x.device.type == "cpu" and interpreting())
    )


@cache
def interpreting() -> bool:
    """Return whether the kernels run in Triton's interpreter, on the CPU; settled when this file is imported."""
    return triton is not None and not isinstance(mixed, triton.runtime.JITFunction)


@cache
def _suits(device: torch.device, dtype: torch.dtype) -> bool:
    least = BFLOAT16_GENERATION if dtype == torch.bfloat16 else GENERATION
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= least


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Context in which kernels are launched on a tensor's GPU; nothing changes for a tensor of the CPU.

    Args:
        x: what a kernel works on.
    """
    return cast("AbstractContextManager[None]", torch.cuda.device_of(x))  # type: ignore[no-untyped-call]  # as torch has it


# ---------------------------------------------------------------------------------------------------- tiles


@jit
def share_of(
    tiles: tl.tensor, share: tl.tensor, chunks: tl.tensor, tile_channels: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Share of this program: its channels, its number among their programs, its first tile and the one after."""
    chunk, group = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    channel = group * tile_channels + tl.arange(0, tile_channels)
    return channel, chunk, chunk * share, tl.minimum((chunk + 1) * share, tiles)


@jit
def places_of(
    tile: tl.tensor, channel: tl.tensor, rows: tl.tensor, channels: tl.tensor, inner: tl.tensor, tiles_inner: tl.tensor,
    tile_rows: tl.constexpr, tile_inner: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Places in memory of a tile's elements, and which of them exist; shaped (rows, channels, inner) like the tile."""
    if channel.shape[0] == 1:  # one clipping range: one stretch of memory
        place = (tl.cast(tile, tl.int64) * tile_inner + tl.arange(0, tile_inner))[None, None, :]
        real = place < inner
    else:
        row = (tl.cast(tile // tiles_inner, tl.int64) * tile_rows + tl.arange(0, tile_rows))[:, None, None]
        column = (tl.cast(tile % tiles_inner, tl.int64) * tile_inner + tl.arange(0, tile_inner))[None, None, :]
        place = (row * channels + channel[None, :, None]) * inner + column
        real = (row < rows) & (channel < channels)[None, :, None] & (column < inner)
    return place, real


@jit
def along_rows(of_channel: tl.tensor) -> tl.tensor:
    """A number for each channel of a tile, ready to meet its elements."""
    return of_channel[None, :, None]


@jit
def rounded(x: tl.tensor) -> tl.tensor:
    """The nearest whole number, the even one of two, if |x| < 2^22: beside 1.5 * 2^23 float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


# ---------------------------------------------------------------------------------------------------- noise


@jit
def halves_of(key: tl.tensor) -> tl.tensor:
    """The low and the high half of a key in memory, 32 bits each."""
    whole = tl.load(key)
    return (whole & 0xFFFFFFFF).to(tl.uint32), (whole >> 32).to(tl.uint32)


@jit
def mixed(pair: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """32 bits for a pair of elements: the hash of ``nipq.functional.counter_rng``."""
    h = pair * 0x9E3779B9 + low
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D + high
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@jit
def noise_times(
    scale: tl.tensor, tile: tl.tensor, place: tl.tensor, low: tl.tensor, high: tl.tensor,
    table: tl.tensor, count: tl.tensor, pairs: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Noise of a tile, units of the step, times a scale: uniform, or out of a table of errors unless that is empty.

    In pairs: the tile is one stretch of memory from an even place on, and one hash serves two elements. The scale takes
    in the 2^-16 of uniform noise: a power of two, so the product is rounded as if that were multiplied on its own.
    """
    if pairs:
        size: tl.constexpr = place.shape[2] // 2
        first = (tl.cast(tile, tl.int64) * size).to(tl.uint32)
        h = mixed(first + tl.arange(0, size).to(tl.uint32), low, high)
        half = tl.interleave(h & 0xFFFF, h >> 16)[None, None, :]
    else:
        h = mixed((place >> 1).to(tl.uint32), low, high)
        half = tl.where((place & 1) == 1, h >> 16, h & 0xFFFF)
    signed = (half << 16).to(tl.int32, bitcast=True) >> 16
    noise = (signed.to(tl.float32) + 0.5) * (scale * (1.0 / 65536))
    if table is not None:
        noise = tl.where(count > 0, tl.load(table + ((half * count) >> 16)) * scale, noise)
    return noise


# ----------------------------------------------------------------------------------------------------- sums


@jit
def put_sums(
    to: tl.tensor, slope: tl.tensor, lower: tl.tensor, upper: tl.tensor,
    chunk: tl.tensor, chunks: tl.tensor, channel: tl.tensor, channels: tl.tensor,
) -> None:  # fmt: skip
    """Store one program's sums in planes of (chunks, channels): each has its own place, so none waits for another."""
    plane = tl.cast(chunks, tl.int64) * channels
    to += tl.cast(chunk, tl.int64) * channels + channel
    tl.store(to, tl.sum(tl.sum(slope, 2), 0), mask=channel < channels)
    tl.store(to + plane, tl.sum(tl.sum(lower, 2), 0), mask=channel < channels)
    tl.store(to + 2 * plane, tl.sum(tl.sum(upper, 2), 0), mask=channel < channels)


@jit
def sum_of(
    sums: tl.tensor, plane: tl.tensor, channel: tl.tensor, channels: tl.tensor, chunks: tl.tensor,
    tile_channels: tl.constexpr, tile_chunks: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum of one plane over its chunks, in float64 and always in one order."""
    start = sums + plane * (tl.cast(chunks, tl.int64) * channels)
    total = tl.zeros([tile_chunks, tile_channels], tl.float64)
    for first in range(0, chunks, tile_chunks):
        chunk = (first + tl.arange(0, tile_chunks))[:, None]
        found = (chunk < chunks) & (channel < channels)[None, :]
        part = tl.load(start + chunk.to(tl.int64) * channels + channel[None, :], mask=found, other=0)
        total += part.to(tl.float64)
    return tl.sum(total, 0)


@jit
def sigmoid(raw: tl.tensor) -> tl.tensor:
    """Logistic sigmoid of a float64 number."""
    return 1.0 / (1.0 + tl.exp(-raw))


@jit
def softplus(raw: tl.tensor) -> tl.tensor:
    """log(1 + t) with t = e^raw, in float64; t log(u) / (u - 1) with u = 1 + t rounded loses no digit of a small t."""
    t = tl.exp(tl.minimum(raw, 20.0))
    u = 1.0 + t
    beyond = tl.where(u == 1.0, 1.0, u - 1.0)
    near = tl.where(u == 1.0, t, t * (tl.log(u) / beyond))
    return tl.where(raw > 20.0, raw, near)


@jit
def bits_of(
    bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor, key: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The whole bit-width, float32, from whichever form it is given in."""
    if bits is not None:
        whole = tl.load(bits)
    elif bits_frozen is not None:
        whole = tl.load(bits_frozen).to(tl.float32)
    else:
        soft = (least + (most - least) * sigmoid(tl.load(bit_raw).to(tl.float64))).to(tl.float32)
        whole = soft * 0.0 + choices[0]
        if len(choices) > 1:
            upper = soft * 0.0 + choices[1]
            for i in tl.static_range(2, len(choices)):  # the two around it; beyond the ends the two at that end
                beyond = soft >= upper
                whole = tl.where(beyond, upper, whole)
                upper = tl.where(beyond, choices[i] * 1.0, upper)
            if stochastic:
                low, high = halves_of(key)
                draw = (mixed(low * 0 + 0xFFFFFFFF, low, high) >> 8).to(tl.float32) * (1.0 / (1 << 24))
                up = draw < tl.div_rn(soft - whole, upper - whole)
            else:
                up = soft - whole > upper - soft
            whole = tl.where(up, upper, whole)
    return whole


@jit
def power_of_two(whole: tl.tensor) -> tl.tensor:
    """2 to a whole number, exactly."""
    return ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@jit
def range_of(
    channel: tl.tensor, channels: tl.tensor, alpha: tl.tensor, alpha_raw: tl.tensor, bits: tl.tensor, shift: tl.tensor,
    kind: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Step, lower and upper end, zero point, n and alpha of channels, float32; alpha is given, or its parameter."""
    if alpha is not None:
        end = tl.load(alpha + channel, mask=channel < channels, other=1)
    else:
        raw = tl.load(alpha_raw + channel, mask=channel < channels, other=1)
        end = softplus(raw.to(tl.float64)).to(tl.float32)
    n = power_of_two(bits - 1) if kind == 0 or kind == 3 else power_of_two(bits)
    n -= 0.5 if kind == 3 else 1.0
    n = end * 0.0 + n
    step = tl.div_rn(end, n)
    zero, lower, upper = end * 0.0, end * 0.0, end
    if kind == 0 or kind == 3:
        lower = -end
    elif kind == 2:
        zero = rounded(tl.minimum(tl.div_rn(zero + shift, step), n))
        lower = -(zero * step)
        upper = end - zero * step
    return step, lower, upper, zero, n, end


@jit
def finish_kernel(
    sums: tl.tensor, d_alpha: tl.tensor, d_bits: tl.tensor, channels: tl.tensor, chunks: tl.tensor,
    alpha: tl.tensor, alpha_raw: tl.tensor, bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor,
    shift: tl.tensor, key: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr, kind: tl.constexpr,
    tile_channels: tl.constexpr, tile_chunks: tl.constexpr,
) -> None:  # fmt: skip
    """Turn the sums into the gradients of clipping ranges and bits, or of the parameters behind them; one program.

    The step is alpha / n; the ends are -alpha and alpha, 0 and alpha, or -zero step and alpha - zero step, where zero
    counts as constant.
    """
    whole = bits_of(bit_raw, bits_frozen, bits, key, least, most, choices, stochastic)
    moved_bits = tl.zeros([tile_channels], tl.float64)
    for first in range(0, channels, tile_channels):
        channel = first + tl.arange(0, tile_channels)
        slope = sum_of(sums, 0, channel, channels, chunks, tile_channels, tile_chunks)
        lower = sum_of(sums, 1, channel, channels, chunks, tile_channels, tile_chunks)
        upper = sum_of(sums, 2, channel, channels, chunks, tile_channels, tile_chunks)
        _, _, _, zero, n, end = range_of(channel, channels, alpha, alpha_raw, whole, shift, kind)
        n = n.to(tl.float64)
        moved = slope - zero.to(tl.float64) * (lower + upper)
        at_end = moved / n + upper
        if kind == 0 or kind == 3:
            at_end -= lower
        if alpha is None:
            at_end *= sigmoid(tl.load(alpha_raw + channel, mask=channel < channels, other=0).to(tl.float64))
        tl.store(d_alpha + channel, at_end.to(tl.float32), mask=channel < channels)
        ln_2 = 0.6931471805599453
        power = n + (0.5 if kind == 3 else 1.0)
        moved_bits -= moved * end.to(tl.float64) * power * ln_2 / (n * n)
    if d_bits is not None:
        found = tl.sum(moved_bits, 0)
        if bit_raw is not None:
            share = sigmoid(tl.load(bit_raw).to(tl.float64))
            found *= (most - least) * share * (1.0 - share)
        tl.store(d_bits, found.to(tl.float32))


def proxy_forward(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The noise proxy of ``nipq.functional.proxy``.

    Args:
        x: dense, float32, float16 or bfloat16.
        tensors: clipping range, bits and key.
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
    """Arguments of a kernel of the noise proxy that concern the elements."""
    return {
        "table": tensors.table, "table_count": tensors.table_count,
        "cap": float(settings.cap), "capped": settings.cap < math.inf,
    }  # fmt: skip


def _scalars(tensors: ProxyTensors, settings: ProxySettings) -> dict[str, Any]:
    """Arguments of a kernel that do not depend on the elements."""
    return {
        "alpha": None, "alpha_raw": tensors.alpha_raw, "key": tensors.key,
        "bit_raw": tensors.bit_raw, "bits_frozen": tensors.bits_frozen, "bits": tensors.bits,
        "least": float(settings.low), "most": float(settings.high), "choices": settings.choices,
        "stochastic": settings.stochastic,
        "kind": GRID_NUMBERS[settings.grid.kind], "shift": float(settings.grid.shift),
    }  # fmt: skip


@jit
def count_of(table: tl.tensor, table_count: tl.tensor) -> tl.tensor:
    """Number of errors to draw from."""
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
        inside = tl.where(below | above | (value != value), 0.0, g)
        passed = inside
        if capped and cutting:
            highest = with_noise(cap, noise * unit, low_end, up_end, after_low, before_up, element)
            passed = tl.where(cuts & (value == highest), 0.0, inside)
        tl.store(dx + place, passed.to(dx.dtype.element_ty), mask=real)
        slopes += inside * noise
        lowers += tl.where(below, g, 0.0)
        uppers += tl.where(above, g, 0.0)
    put_sums(sums, slopes * (1.0 / 65536), lowers, uppers, chunk, chunks, channel, channels)


def round_forward(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float) -> Tensor:
    """The true quantizer of ``nipq.functional.uniform``.

    Args:
        x: dense, float32, float16 or bfloat16.
        alpha: clipping ranges, float32, C numbers.
        bits: whole bit-width, float32, shape (1,).
        grid: which levels.
        channel_axis: axis of the clipping ranges.
        cap: what x is cut to before, infinity for nothing.

    Returns:
        Values on the grid, shape, type and layout of x.
    """
    y = torch.empty_like(x)
    tiles = tiling(x, alpha.numel(), channel_axis)
    with on_device_of(x):
        round_forward_kernel[tiles.grid](
            x, y, cap=float(cap), **_rounding_scalars(alpha, bits, grid), **tiles.arguments, **tiles.options
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
    scalars = _rounding_scalars(alpha, bits, grid)
    with on_device_of(x):
        round_backward_kernel[tiles.grid](grad, x, dx, sums, **scalars, cap=cap, **tiles.arguments, **tiles.options)
        finish_kernel[(1,)](sums, d_alpha, d_bits, **_NO_PARAMETERS, **scalars, **tiles.sum_arguments, **tiles.options)
    return dx, d_alpha, d_bits


_NO_PARAMETERS = {
    "alpha_raw": None, "bit_raw": None, "bits_frozen": None, "key": None,
    "least": 0.0, "most": 0.0, "choices": (), "stochastic": False,
}  # fmt: skip


def _rounding_scalars(alpha: Tensor, bits: Tensor, grid: Grid) -> dict[str, Any]:
    return {"alpha": alpha, "bits": bits, "shift": float(grid.shift), "kind": GRID_NUMBERS[grid.kind]}


@jit
def code_of(quotient: tl.tensor, zero: tl.tensor, n: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Code of x / step, clamped before it is rounded: the ends are levels, so the order makes no difference."""
    if kind == 3:  # levels half a step beside
        return tl.floor(tl.minimum(tl.maximum(quotient, -n), n)) + 0.5
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
        within = (value > lower) & (value < upper)  # not a number is not
        tl.store(dx + place, tl.where(within & (given < cap), g, 0.0).to(dx.dtype.element_ty), mask=real)
        quotient = tl.div_rn(value, step)
        slopes += tl.where(within, g * (code_of(quotient, zero, n, kind) - quotient), 0.0)
        lowers += tl.where(value <= lower, g, 0.0)
        uppers += tl.where(value >= upper, g, 0.0)
    put_sums(sums, slopes, lowers, uppers, chunk, chunks, channel, channels)
