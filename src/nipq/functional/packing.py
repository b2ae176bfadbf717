"""Whole codes as bit-planes: a tensor of any bit-width b takes exactly b * ceil(N / 8) bytes.

Codes are stored in offset binary, ``u = code - lowest``, so that the lowest code is 0; on a symmetric grid the pattern
of b ones is never used, and of the odd codes of a balanced grid ``u`` is half that. Plane i holds bit i of every u,
eight to a byte, the first in the lowest bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nipq.errors import ConfigError, FileFormatError
from nipq.functional.grid import BALANCED_BITS, SIGNED, Grid, code_range

#: Bit-widths that bit-planes are made for: below 2 there is no level but zero, above 16 no layer is exact.
FEWEST_BITS, MOST_BITS = 2, 16


def whole_codes(bits: int, grid: Grid = SIGNED) -> range:
    """The whole codes of a weight, ascending.

    Args:
        bits: bit-width, 2 to 16.
        grid: a signed, balanced or full grid.

    Returns:
        -n to n with n = 2^(b-1) - 1, the odd numbers from -(2^b - 1) to 2^b - 1 when balanced, or -2^(b-1) to
        2^(b-1) - 1 when full.

    Raises:
        ConfigError: if no plane is made for that bit-width, or it is above ``BALANCED_BITS`` on a balanced grid.

    Example:
        >>> from nipq.functional.grid import BALANCED, FULL
        >>> list(whole_codes(2)), list(whole_codes(2, BALANCED)), list(whole_codes(2, FULL))
        ([-1, 0, 1], [-3, -1, 1, 3], [-2, -1, 0, 1])
    """
    most = BALANCED_BITS if grid.kind == "balanced" else MOST_BITS
    if not FEWEST_BITS <= bits <= most:
        raise ConfigError(f"expected a bit-width from {FEWEST_BITS} to {most}; found {bits}. Use one of those.")
    one = torch.ones(1)
    low, high = (int(end * grid.codes_per_step) for end in code_range(one, float(bits), grid))
    return range(low, high + 1, grid.codes_per_step)


def payload_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes: b * ceil(N / 8).

    Args:
        count: number of codes, >= 0.
        bits: bit-width, 2 to 16.

    Returns:
        Bytes.

    Example:
        >>> payload_bytes(9, 3)
        6
    """
    return bits * -(-count // 8)


def pack(codes: NDArray[Any], bits: int, grid: Grid = SIGNED) -> NDArray[np.uint8]:
    """Codes to bit-planes.

    Args:
        codes: whole numbers out of :func:`whole_codes`, any shape, any integer type.
        bits: bit-width, 2 to 16.
        grid: whose codes they are.

    Returns:
        Planes, shape ``(bits, ceil(N / 8))``; unused bits of the last byte are 0.

    Raises:
        ConfigError: if a code or the bit-width is out of range.

    Example:
        >>> pack(np.array([-1, 0, 1, 1]), bits=2)
        array([[ 2],
               [12]], dtype=uint8)
    """
    known = whole_codes(bits, grid)
    offset = codes.astype(np.int32).ravel() - known.start
    if codes.size and (offset.min() < 0 or offset.max() > known[-1] - known.start or (offset % known.step).any()):
        raise ConfigError(
            f"expected codes {_described(known)} for {bits} bits; found {codes.min()} to {codes.max()}. "
            "Pack them with the bit-width and the grid that they were made with."
        )
    offset_binary = (offset // known.step).astype(np.uint16)
    planes = np.empty((bits, -(-codes.size // 8)), np.uint8)
    for bit in range(bits):
        planes[bit] = np.packbits(((offset_binary >> bit) & 1).astype(np.uint8), bitorder="little")
    return planes


def unpack(
    planes: NDArray[np.uint8], bits: int, shape: Sequence[int], grid: Grid = SIGNED
) -> NDArray[np.int8] | NDArray[np.int16]:
    """Bit-planes to codes, the inverse of :func:`pack`.

    Args:
        planes: shape ``(bits, ceil(N / 8))``.
        bits: bit-width, 2 to 16.
        shape: shape of the codes, N elements.
        grid: whose codes they are.

    Returns:
        Codes: int8 up to 8 bits, int16 above.

    Raises:
        ConfigError: if the bit-width is out of range.
        FileFormatError: if the planes do not have that shape, or hold a pattern that no code has.

    Example:
        >>> unpack(np.array([[2], [12]], np.uint8), bits=2, shape=(2, 2))
        array([[-1,  0],
               [ 1,  1]], dtype=int8)
    """
    known, count = whole_codes(bits, grid), math.prod(shape)
    if planes.dtype != np.uint8 or planes.shape != (bits, -(-count // 8)):
        raise FileFormatError(
            f"expected planes of {bits} x {-(-count // 8)} bytes for {count} codes; found {planes.dtype} of shape "
            f"{planes.shape}. The file is damaged or was written by something else."
        )
    offset_binary = np.zeros(count, np.int32)
    for bit in range(bits):
        offset_binary |= np.unpackbits(planes[bit], count=count, bitorder="little").astype(np.int32) << bit
    if count and int(offset_binary.max()) >= len(known):
        raise FileFormatError(
            f"expected codes {_described(known)} for {bits} bits; found a pattern that none of them has. "
            "The file is damaged or was written by something else."
        )
    codes = (offset_binary * known.step + known.start).reshape(tuple(shape))
    return codes.astype(np.int8) if bits <= 8 else codes.astype(np.int16)


def _described(known: range) -> str:
    return f"from {known[0]} to {known[-1]}{', odd ones,' if known.step == 2 else ''}"
