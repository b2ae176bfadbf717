"""Whole codes as bit-planes: a tensor of any bit-width b takes exactly b * ceil(N / 8) bytes.

Codes are stored in offset binary, ``u = code + n`` with n = 2^(b-1) - 1, so that the lowest code is 0 and the pattern
of b ones is never used. Plane i holds bit i of every u, eight to a byte, the first in the lowest bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nipq.errors import ConfigError, FileFormatError
from nipq.functional.grid import SIGNED, levels

#: Bit-widths that bit-planes are made for: below 2 there is no level but zero, above 16 no layer is exact.
FEWEST_BITS, MOST_BITS = 2, 16


def largest_code(bits: int) -> int:
    """Largest code n = 2^(b-1) - 1 of a symmetric tensor of ``bits`` bits; the lowest is -n.

    Args:
        bits: bit-width, 2 to 16.

    Returns:
        n.

    Raises:
        ConfigError: if no plane is made for that bit-width.

    Example:
        >>> largest_code(4)
        7
    """
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise ConfigError(f"expected a bit-width from {FEWEST_BITS} to {MOST_BITS}; found {bits}. Use one of those.")
    return int(levels(bits, SIGNED))


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


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes to bit-planes.

    Args:
        codes: whole numbers from -n to n, any shape, any integer type.
        bits: bit-width, 2 to 16.

    Returns:
        Planes, shape ``(bits, ceil(N / 8))``; unused bits of the last byte are 0.

    Raises:
        ConfigError: if a code or the bit-width is out of range.

    Example:
        >>> pack(np.array([-1, 0, 1, 1]), bits=2)
        array([[ 2],
               [12]], dtype=uint8)
    """
    largest = largest_code(bits)
    if codes.size and not -largest <= int(codes.min()) <= int(codes.max()) <= largest:
        raise ConfigError(
            f"expected codes from {-largest} to {largest} for {bits} bits; found {codes.min()} to {codes.max()}. "
            "Pack them with the bit-width that they were made with."
        )
    offset_binary = (codes.astype(np.int32).ravel() + largest).astype(np.uint16)
    planes = np.empty((bits, -(-codes.size // 8)), np.uint8)
    for bit in range(bits):
        planes[bit] = np.packbits(((offset_binary >> bit) & 1).astype(np.uint8), bitorder="little")
    return planes


def unpack(planes: NDArray[np.uint8], bits: int, shape: Sequence[int]) -> NDArray[np.int8] | NDArray[np.int16]:
    """Bit-planes to codes, the inverse of :func:`pack`.

    Args:
        planes: shape ``(bits, ceil(N / 8))``.
        bits: bit-width, 2 to 16.
        shape: shape of the codes, N elements.

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
    largest, count = largest_code(bits), math.prod(shape)
    if planes.dtype != np.uint8 or planes.shape != (bits, -(-count // 8)):
        raise FileFormatError(
            f"expected planes of {bits} x {-(-count // 8)} bytes for {count} codes; found {planes.dtype} of shape "
            f"{planes.shape}. The file is damaged or was written by something else."
        )
    offset_binary = np.zeros(count, np.int32)
    for bit in range(bits):
        offset_binary |= np.unpackbits(planes[bit], count=count, bitorder="little").astype(np.int32) << bit
    if count and int(offset_binary.max()) > 2 * largest:
        raise FileFormatError(
            f"expected codes from {-largest} to {largest} for {bits} bits; found {int(offset_binary.max()) - largest}. "
            "The file is damaged or was written by something else."
        )
    codes = (offset_binary - largest).reshape(tuple(shape))
    return codes.astype(np.int8) if bits <= 8 else codes.astype(np.int16)
