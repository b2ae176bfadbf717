"""What the Triton kernels have in common over the elements: places, noise, and the sums of a gradient.

Importable without Triton; the kernels are then functions that nobody calls. What stands under ``@jit`` runs on the
device, or on the CPU in Triton's interpreter, where the tests hold it to the plain maths.

Two rules keep it equal to torch bit for bit: no multiply and add fused into one (``Tiling.options``), and true
divisions only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from nipq.functional.counter_rng import is_dense

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "along_rows", "halves_of", "interpreting", "jit", "mixed", "noise_times", "on_device_of", "places_of", "put_sums",
    "rounded", "share_of", "sum_of", "supported", "tl", "triton",
]  # fmt: skip

#: Oldest generation of NVIDIA's that Triton compiles for, and the first with bfloat16.
GENERATION, BFLOAT16_GENERATION = (7, 0), (8, 0)

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401 -- Triton ships no types
    """A function for the device; left as it is where there is no Triton."""
    return triton.jit(function) if triton else function


def supported(x: Tensor, alpha: Tensor, channel_axis: int) -> bool:  # noqa: ARG001 -- any axis will do
    """Whether there is a kernel for such a tensor.

    Args:
        x: what is to be quantized.
        alpha: its boundary, or the parameter of it.
        channel_axis: axis of the boundaries.
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
    """Whether the kernels run in Triton's interpreter, on tensors of the CPU; settled when this file is imported."""
    return triton is not None and not isinstance(mixed, triton.runtime.JITFunction)


@cache
def _suits(device: torch.device, dtype: torch.dtype) -> bool:
    least = BFLOAT16_GENERATION if dtype == torch.bfloat16 else GENERATION
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= least


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Where kernels are launched from; nothing changes for a tensor of the CPU.

    Args:
        x: what a kernel works on.
    """
    return cast("AbstractContextManager[None]", torch.cuda.device_of(x))  # type: ignore[no-untyped-call]  # as torch has it


# ---------------------------------------------------------------------------------------------------- tiles


@jit
def share_of(
    tiles: tl.tensor, share: tl.tensor, chunks: tl.tensor, tile_channels: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """What this program works on: its channels, its number among their programs, its first tile and the one after."""
    chunk, group = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    channel = group * tile_channels + tl.arange(0, tile_channels)
    return channel, chunk, chunk * share, tl.minimum((chunk + 1) * share, tiles)


@jit
def places_of(
    tile: tl.tensor, channel: tl.tensor, rows: tl.tensor, channels: tl.tensor, inner: tl.tensor, tiles_inner: tl.tensor,
    tile_rows: tl.constexpr, tile_inner: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Places in memory of a tile's elements, and which of them exist; shaped (rows, channels, inner) like the tile."""
    if channel.shape[0] == 1:  # one boundary: one stretch of memory
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
    """What one program found, into planes of (chunks, channels): each has its own place, so none waits for another."""
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
    """One plane added up over its chunks, in float64 and always in one order."""
    start = sums + plane * (tl.cast(chunks, tl.int64) * channels)
    total = tl.zeros([tile_chunks, tile_channels], tl.float64)
    for first in range(0, chunks, tile_chunks):
        chunk = (first + tl.arange(0, tile_chunks))[:, None]
        found = (chunk < chunks) & (channel < channels)[None, :]
        part = tl.load(start + chunk.to(tl.int64) * channels + channel[None, :], mask=found, other=0)
        total += part.to(tl.float64)
    return tl.sum(total, 0)
