"""Bit-planes hold codes of any bit-width exactly, in the promised number of bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nipq.errors import ConfigError, FileFormatError
from nipq.functional.packing import largest_code, pack, payload_bytes, unpack

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
def test_every_code_of_a_bit_width_survives(bits: int) -> None:
    codes = np.arange(-largest_code(bits), largest_code(bits) + 1)
    assert len(codes) == 2**bits - 1
    assert (unpack(pack(codes, bits), bits, codes.shape) == codes).all()


def test_the_planes_are_offset_binary_with_the_lowest_bit_first() -> None:
    """Written out by hand for 3 bits: -3, 0, 2, 3 are stored as 0, 3, 5, 6."""
    planes = pack(np.array([-3, 0, 2, 3]), 3)
    assert planes.tolist() == [[0b0110], [0b1010], [0b1100]]


@pytest.mark.parametrize("bits", BITS)
def test_a_code_out_of_range_is_refused(bits: int) -> None:
    for code in (largest_code(bits) + 1, -largest_code(bits) - 1):
        with pytest.raises(ConfigError, match=f"expected codes from .* for {bits} bits; found"):
            pack(np.array([0, code]), bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_unused_pattern_is_refused(bits: int) -> None:
    planes = np.full((bits, 1), 0b100, np.uint8)  # the third code has all its bits set
    with pytest.raises(FileFormatError, match=f"found {2 ** (bits - 1)}"):
        unpack(planes, bits, (3,))


@pytest.mark.parametrize("planes", [np.zeros((3, 2), np.uint8), np.zeros((4, 1), np.uint8), np.zeros((4, 2), np.int8)])
def test_planes_of_another_shape_are_refused(planes: np.ndarray) -> None:
    with pytest.raises(FileFormatError, match="expected planes of 4 x 2 bytes for 9 codes"):
        unpack(planes, 4, (9,))


@pytest.mark.parametrize("bits", [1, 17])
def test_other_bit_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="from 2 to 16"):
        pack(np.array([0]), bits)
