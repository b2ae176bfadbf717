"""Levels, step, zero point and range."""

from __future__ import annotations

import math

import pytest
import torch

from nipq.errors import ConfigError
from nipq.functional.grid import SIGNED, UNSIGNED, Grid, code_range, levels, step_size, value_range, zero_point

HSWISH = Grid("shifted", 0.375)
BITS = torch.arange(2.0, 17.0)


def test_levels_are_exact_whole_numbers() -> None:
    assert levels(BITS, SIGNED).tolist() == [2 ** (b - 1) - 1 for b in range(2, 17)]
    for grid in (UNSIGNED, HSWISH):
        assert levels(BITS, grid).tolist() == [2**b - 1 for b in range(2, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_levels_accept_any_number_type(dtype: torch.dtype) -> None:
    assert levels(torch.tensor([4], dtype=dtype), SIGNED).item() == 7
    assert levels(4, SIGNED).item() == 7


@pytest.mark.parametrize("bits", [1.0, 1.99, 0])
def test_levels_refuse_fewer_than_two_bits(bits: float) -> None:
    with pytest.raises(ConfigError, match=f"expected bit-widths of at least 2; found {bits:g}"):
        levels(torch.tensor([8.0, bits]), SIGNED)


def test_step_times_levels_is_the_boundary() -> None:
    alpha = torch.tensor([0.3, 2.0, 11.0], dtype=torch.float64).reshape(3, 1)
    for grid in (SIGNED, UNSIGNED, HSWISH):
        torch.testing.assert_close(
            step_size(alpha, BITS, grid) * levels(BITS, grid), alpha.expand(3, 15), rtol=1e-7, atol=0
        )


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED, HSWISH], ids=lambda g: g.kind)
def test_step_gradients_equal_table_1_4(grid: Grid) -> None:
    alpha = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    for b in (2.0, 2.6, 4.0, 8.0):
        bits = torch.tensor([b], dtype=torch.float64, requires_grad=True)
        by_alpha, by_bits = torch.autograd.grad(step_size(alpha, bits, grid), (alpha, bits))
        power = 2 ** (b - 1) if grid.kind == "signed" else 2**b
        assert by_alpha.item() == pytest.approx(1 / (power - 1), rel=1e-14)
        assert by_bits.item() == pytest.approx(-1.7 * math.log(2) * power / (power - 1) ** 2, rel=1e-14)


def test_only_a_shifted_grid_has_a_zero_point() -> None:
    alpha, bits = torch.tensor([6.0]), torch.tensor([8.0])
    assert zero_point(alpha, bits, SIGNED).tolist() == [0]
    assert zero_point(alpha, bits, UNSIGNED).tolist() == [0]
    assert zero_point(alpha, bits, HSWISH).tolist() == [round(0.375 * 255 / 6)]


def test_zero_point_stays_within_the_codes_and_has_no_gradient() -> None:
    alpha = torch.tensor([0.1], requires_grad=True)  # shorter than the shift
    for b in (2.0, 2.5, 4.0):
        z = zero_point(alpha, torch.tensor([b], requires_grad=True), HSWISH)
        assert z.item() == math.floor(2**b - 1)
        assert not z.requires_grad


def test_code_and_value_ranges_agree_and_hold_zero() -> None:
    alpha = torch.tensor([[0.7], [3.0]], dtype=torch.float64)
    for grid in (SIGNED, UNSIGNED, HSWISH):
        low, high = code_range(alpha, BITS.double(), grid)
        lower, upper = value_range(alpha, BITS.double(), grid)
        step = step_size(alpha, BITS.double(), grid)
        torch.testing.assert_close((low * step).expand(2, 15), lower.expand(2, 15), rtol=0, atol=1e-15)
        torch.testing.assert_close((high * step).expand(2, 15), upper.expand(2, 15), rtol=0, atol=1e-14)
        assert (low <= 0).all()
        assert (high >= 0).all()
        assert (low == low.round()).all()
        count = (high - low + 1).expand(2, 15)
        expected = 2 ** BITS.double() - (1 if grid.kind == "signed" else 0)
        assert (count == expected).all()


def test_shifted_ends_move_with_alpha_and_bits_at_a_constant_zero_point() -> None:
    alpha = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    bits = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    z = zero_point(alpha, bits, HSWISH).item()
    assert z > 0
    slope = -3.0 * math.log(2) * 16 / 15**2
    for end, (by_alpha, by_bits) in zip(
        value_range(alpha, bits, HSWISH), [(-z / 15, -z * slope), (1 - z / 15, -z * slope)], strict=True
    ):
        got = torch.autograd.grad(end, (alpha, bits), retain_graph=True)
        assert got[0].item() == pytest.approx(by_alpha, rel=1e-14)
        assert got[1].item() == pytest.approx(by_bits, rel=1e-14)


@pytest.mark.parametrize(
    ("kind", "shift", "message"),
    [
        ("ternary", 0.0, "expected a grid kind out of signed, balanced, full, unsigned, shifted; found 'ternary'"),
        ("shifted", -0.1, "expected a finite shift >= 0"),
        ("shifted", math.nan, "expected a finite shift >= 0"),
        ("shifted", math.inf, "expected a finite shift >= 0"),
        ("signed", 0.375, "expected no shift on a signed grid; found 0.375"),
        ("unsigned", 0.375, "expected no shift on a unsigned grid; found 0.375"),
    ],
)
def test_an_impossible_grid_is_refused(kind: str, shift: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid(kind, shift)  # type: ignore[arg-type]
