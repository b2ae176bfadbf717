"""Boundary parameters, boundaries from data, and the values of a tensor that they are taken from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nipq.errors import ConfigError, NonFiniteError
from nipq.functional import theory
from nipq.functional.clipping import alpha_from_raw, even_stride, max_range, noise_optimal_range, raw_from_alpha
from nipq.functional.grid import BALANCED, FULL, SIGNED, UNSIGNED, Grid, value_range

HSWISH = Grid("shifted", 0.375)
properties = settings(deadline=None, max_examples=60)


def test_published_starts() -> None:
    """Section 1.5: raw 6 is alpha 6.0025, raw 3 is 3.049, and the least possible start is ln 2."""
    assert alpha_from_raw(torch.tensor([6.0, 3.0, 0.0])).tolist() == pytest.approx([6.0025, 3.0486, math.log(2)], 1e-4)


def test_slope_is_the_sigmoid() -> None:
    raw = torch.linspace(-9, 9, 19, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(alpha_from_raw(raw).sum(), raw)
    torch.testing.assert_close(grad, torch.sigmoid(raw.detach()), rtol=1e-12, atol=0)


@properties
@given(alpha=st.floats(1e-8, 1e6))
def test_raw_and_alpha_are_inverse(alpha: float) -> None:
    for dtype, relative in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        value = torch.tensor([alpha], dtype=dtype)
        torch.testing.assert_close(alpha_from_raw(raw_from_alpha(value)), value, rtol=relative, atol=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_boundary_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="expected positive, finite clipping ranges; found"):
        raw_from_alpha(torch.tensor([1.0, alpha]))


def test_max_boundary_truncates_nothing_and_is_the_smallest_that_does_not() -> None:
    x = torch.tensor([-3.0, 0.5, 2.0])
    assert max_range(x, SIGNED).tolist() == [3.0]
    assert max_range(x, UNSIGNED).tolist() == [2.0]
    assert max_range(x, HSWISH).tolist() == [2.375]


def test_one_boundary_for_each_channel() -> None:
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 5.0])[:, None]
    for grid in (SIGNED, UNSIGNED, HSWISH):
        for axis in (1, -2):
            peaks = max_range(x, grid, channel_axis=axis)
            roots = noise_optimal_range(x, 4, grid, channel_axis=axis)
            assert peaks.shape == roots.shape == (3,)
            for c in range(3):
                assert torch.equal(peaks[c : c + 1], max_range(x[:, c], grid))
                torch.testing.assert_close(roots[c : c + 1], noise_optimal_range(x[:, c], 4, grid))


def test_each_channel_may_have_bits_of_its_own() -> None:
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    roots = noise_optimal_range(x, torch.tensor([2.0, 8.0]), SIGNED, channel_axis=0)
    assert roots[0] == noise_optimal_range(x[0], torch.tensor([2.0]), SIGNED)
    assert roots[1] == noise_optimal_range(x[1], torch.tensor([8.0]), SIGNED)


@properties
@example(x=[0.0, 1.0], bits=2, grid=SIGNED)  # a zero gets noise on a signed grid,
@example(x=[0.0, 1.0], bits=2, grid=UNSIGNED)  # and none on an unsigned one
@given(
    x=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
    bits=st.integers(2, 8),
    grid=st.sampled_from([SIGNED, UNSIGNED, BALANCED]),
)
def test_t6_the_boundary_is_where_the_proxys_gradient_changes_sign(x: list[float], bits: int, grid: Grid) -> None:
    """On any data, ties, zeros and single points included: negative just below, not negative just above."""
    data = torch.tensor(x, dtype=torch.float64)
    alpha = noise_optimal_range(data, bits, grid).item()
    extent = max_range(data, grid).item()
    if not (data.abs() if grid.is_signed else data.clamp(min=0)).any():
        assert alpha == 1
        return
    assert 0 < alpha <= extent * (1 + 1e-12)
    below, above = (
        theory.proxy_gradient(theory.sample_tails(data, a, grid), a, bits, grid).alpha
        for a in (alpha * (1 - 1e-9), alpha * (1 + 1e-9))
    )
    assert below <= 1e-12
    assert above >= -1e-12


def test_t6_equals_the_closed_form_root_of_the_normal_distribution() -> None:
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for grid in (SIGNED, UNSIGNED):
        for bits in (2, 3, 4, 6):  # at 8 bits the boundary lies where 200 k points are too few
            root = theory.least_error_range(theory.normal_tails, bits, grid).item()
            sample = x if grid == SIGNED else x.clamp(min=0)
            assert noise_optimal_range(sample, bits, grid).item() == pytest.approx(root, rel=3e-3)


def test_a_shifted_grid_uses_the_unsigned_root_of_what_is_shifted() -> None:
    x = torch.nn.functional.hardswish(torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    shifted = noise_optimal_range(x, 4, HSWISH)
    torch.testing.assert_close(shifted, noise_optimal_range(x + 0.375, 4, UNSIGNED))


@properties
@given(x=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30), bits=st.integers(2, 8))
def test_t6_on_a_full_grid_the_derivative_of_the_proxys_error_changes_sign(x: list[float], bits: int) -> None:
    """R = step^2 / 12 P(in) + E[what lies beyond either end, squared]; both ends move with alpha."""
    data = torch.tensor(x, dtype=torch.float64)
    alpha = noise_optimal_range(data, bits, FULL).item()
    n = 2 ** (bits - 1)
    if not data.any():
        assert alpha == 1
        return

    def slope(a: float) -> float:
        lower, upper = value_range(torch.tensor(a, dtype=torch.float64), bits, FULL)
        inside = ((data > lower) & (data < upper)).double().mean()
        beyond = (n - 1) / n * (data - upper).clamp(min=0).mean() + (lower - data).clamp(min=0).mean()
        return float(2 * a / (12 * n**2) * inside - 2 * beyond)

    assert slope(alpha * (1 - 1e-6)) <= 1e-9
    assert slope(alpha * (1 + 1e-6)) >= -1e-9


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED, BALANCED], ids=lambda g: g.kind)
def test_data_without_extent_give_one(grid: Grid) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert max_range(x, grid, channel_axis=0).tolist() == [1.0, 2.0]
    assert noise_optimal_range(x, 8, grid, channel_axis=0)[0] == 1
    assert noise_optimal_range(torch.zeros(5), 8, grid).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_type_of_the_data_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert max_range(x, SIGNED).dtype == dtype
    assert noise_optimal_range(x, 4, SIGNED).dtype == dtype


@pytest.mark.parametrize("find", [max_range, lambda x, grid: noise_optimal_range(x, 4, grid)])
def test_data_that_cannot_be_calibrated_on_are_refused(find) -> None:
    with pytest.raises(ConfigError, match="found an empty tensor"):
        find(torch.empty(0), SIGNED)
    with pytest.raises(NonFiniteError, match="found 2 of 3 elements NaN or infinite"):
        find(torch.tensor([math.nan, 1.0, math.inf]), SIGNED)
    with pytest.raises(ConfigError, match="at least 2"):
        noise_optimal_range(torch.ones(3), 1, SIGNED)


# ---------------------------------------------------------------------- sampling


@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4), most=st.integers(1, 500))
def test_every_column_is_met_before_one_is_met_again(shape: list[int], most: int) -> None:
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    stride = even_stride(len(places), most)
    kept = places[::stride]
    assert len(kept) <= most or stride == 1
    inner = shape[-1]
    assert len(kept[:inner, -1].unique()) == len(kept[:inner])


def test_as_many_as_are_asked_for_but_for_the_search_of_a_coprime() -> None:
    assert even_stride(2**20, 2**12) == 257
    assert even_stride(8 * 528 * 27 * 27, 2**14) == 191  # 188 would be even, 189 is 7 rows
    assert even_stride(0, 5) == even_stride(5, 5) == 1
