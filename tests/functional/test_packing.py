"""Bit-planes hold codes of any bit-width exactly, in the promised number of bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nipq.errors import ConfigError, FileFormatError
from nipq.functional.grid import BALANCED, FULL, SIGNED, Grid
from nipq.functional.packing import pack, payload_bytes, unpack, whole_codes

BITS = range(2, 17)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from(BITS))
    largest = 2 ** (bits - 1) - 1
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    element = st.one_of(st.integers(-largest, largest), st.sampled_from([-largest, 0, largest]))
    return bits, draw(hnp.arrays(np.int32, shape, elements=element))


@given(tensors())
def test_a_round_trip_gives_the_same_codes_in_the_promised_bytes(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    planes = pack(codes, bits)
    assert planes.nbytes == payload_bytes(codes.size, bits) == bits * math.ceil(codes.size / 8)
    back = unpack(planes, bits, codes.shape)
    assert back.dtype == (np.int8 if bits <= 8 else np.int16)
    assert back.shape == codes.shape
    assert (back == codes).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [SIGNED, BALANCED, FULL], ids=lambda grid: grid.kind)
def test_every_code_of_a_bit_width_survives(bits: int, grid: Grid) -> None:
    if grid.kind == "balanced" and bits > 7:
        with pytest.raises(ConfigError, match="expected a bit-width from 2 to 7; found"):
            whole_codes(bits, grid)
        return
    codes = np.array(whole_codes(bits, grid))
    assert len(codes) == (2**bits - 1 if grid.kind == "signed" else 2**bits)
    planes = pack(codes, bits, grid)
    assert planes.nbytes == payload_bytes(len(codes), bits)
    assert (unpack(planes, bits, codes.shape, grid) == codes).all()


def test_the_odd_codes_of_a_balanced_grid_are_halved() -> None:
    """Written out by hand for 2 bits: -3, -1, 1, 3 are stored as 0, 1, 2, 3."""
    assert pack(np.array([-3, -1, 1, 3]), 2, BALANCED).tolist() == [[0b1010], [0b1100]]
    with pytest.raises(ConfigError, match="expected codes from -3 to 3, odd ones, for 2 bits; found -1 to 2"):
        pack(np.array([-1, 2]), 2, BALANCED)


def test_the_planes_are_offset_binary_with_the_lowest_bit_first() -> None:
    """Written out by hand for 3 bits: -3, 0, 2, 3 are stored as 0, 3, 5, 6."""
    planes = pack(np.array([-3, 0, 2, 3]), 3)
    assert planes.tolist() == [[0b0110], [0b1010], [0b1100]]


@pytest.mark.parametrize("bits", BITS)
def test_a_code_out_of_range_is_refused(bits: int) -> None:
    known = whole_codes(bits)
    for code in (known[-1] + 1, known[0] - 1):
        with pytest.raises(ConfigError, match=f"expected codes from .* for {bits} bits; found"):
            pack(np.array([0, code]), bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_unused_pattern_is_refused(bits: int) -> None:
    planes = np.full((bits, 1), 0b100, np.uint8)  # the third code has all its bits set
    with pytest.raises(FileFormatError, match="found a pattern that none of them has"):
        unpack(planes, bits, (3,))


@pytest.mark.parametrize("planes", [np.zeros((3, 2), np.uint8), np.zeros((4, 1), np.uint8), np.zeros((4, 2), np.int8)])
def test_planes_of_another_shape_are_refused(planes: np.ndarray) -> None:
    with pytest.raises(FileFormatError, match="expected planes of 4 x 2 bytes for 9 codes"):
        unpack(planes, 4, (9,))


@pytest.mark.parametrize("bits", [1, 17])
def test_other_bit_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="from 2 to 16"):
        pack(np.array([0]), bits)
