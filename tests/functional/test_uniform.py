"""The evaluation rule, the true quantizer, and truncation masks at, and on either side of, the ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nipq.functional.grid import BALANCED, FULL, SIGNED, UNSIGNED, Grid, code_range, step_size, value_range
from nipq.functional.uniform import inside_range, integer_codes, quantize, truncate, truncation_gradients

HSWISH = Grid("shifted", 0.375)
GRIDS = [SIGNED, UNSIGNED, HSWISH, BALANCED, FULL]

properties = settings(deadline=None, max_examples=60)
grids = st.sampled_from(GRIDS)
bit_widths = st.integers(2, 16).map(lambda b: torch.tensor([float(b)]))
boundaries = st.floats(2.0**-10, 2.0**10, width=32).map(lambda a: torch.tensor([a]))
values = st.lists(st.floats(-2048, 2048, width=32), min_size=1, max_size=40).map(torch.tensor)


@properties
@given(x=values, alpha=boundaries, bits=bit_widths, grid=grids)
def test_codes_are_whole_and_within_the_range(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> None:
    low, high = code_range(alpha, bits, grid)
    codes = integer_codes(x, step_size(alpha, bits, grid), low, high, level_offset=grid.level_offset)
    assert (codes - grid.level_offset == (codes - grid.level_offset).round()).all()
    assert (codes >= low).all()
    assert (codes <= high).all()


@properties
@given(x=values, alpha=boundaries, bits=bit_widths, grid=grids)
def test_values_are_codes_times_step_exactly(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> None:
    step = step_size(alpha, bits, grid)
    expected = integer_codes(x, step, *code_range(alpha, bits, grid), level_offset=grid.level_offset) * step
    assert torch.equal(quantize(x, alpha, bits, grid), expected)


@properties
@given(x=values, alpha=boundaries, bits=bit_widths, grid=grids)
def test_quantizing_twice_is_quantizing_once(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> None:
    once = quantize(x, alpha, bits, grid)
    assert torch.equal(quantize(once, alpha, bits, grid), once)


@properties
@given(alpha=boundaries, bits=bit_widths, grid=grids)
def test_zero_goes_to_zero_or_the_level_above_it(alpha: Tensor, bits: Tensor, grid: Grid) -> None:
    found = quantize(torch.zeros(3), alpha, bits, grid)
    nearest = step_size(alpha, bits, grid) / 2 if grid.kind == "balanced" else torch.zeros(1)
    assert torch.equal(found, nearest.expand(3))


@properties
@given(x=values, alpha=boundaries, bits=bit_widths, grid=grids)
def test_in_range_the_error_is_at_most_half_a_step(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> None:
    x, alpha, bits = x.double(), alpha.double(), bits.double()
    lower, upper = value_range(alpha, bits, grid)
    error = (quantize(x, alpha, bits, grid) - x.clamp(lower, upper)).abs()
    assert (error <= step_size(alpha, bits, grid) * (0.5 + 1e-9)).all()


@properties
@given(bits=bit_widths, grid=grids)
def test_channels_are_quantized_one_by_one(bits: Tensor, grid: Grid) -> None:
    x = torch.linspace(-3, 3, 60).reshape(3, 4, 5)
    alpha = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    together = quantize(x, alpha, bits, grid)
    apart = torch.stack([quantize(x[c], alpha[c], bits, grid) for c in range(3)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("grid", "levels"),
    [(BALANCED, [-1.5, -0.5, 0.5, 1.5]), (FULL, [-1.5, -0.75, 0.0, 0.75])],
    ids=["balanced", "full"],
)
def test_two_bits_have_four_levels(grid: Grid, levels: list[float]) -> None:
    x = torch.linspace(-2, 2, 401)
    assert quantize(x, torch.tensor([1.5]), torch.tensor([2.0]), grid).unique().tolist() == levels


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("grid", [SIGNED, BALANCED, FULL], ids=lambda grid: grid.kind)
def test_every_value_goes_to_the_nearest_of_all_levels(grid: Grid, bits: int) -> None:
    """Against a search among all levels, which are counted."""
    alpha, width = torch.tensor([1.3], dtype=torch.float64), torch.tensor([float(bits)])
    step = step_size(alpha, width, grid)
    low, high = code_range(alpha, width, grid)
    levels = torch.arange(float(low), float(high) + 1, dtype=torch.float64) * step
    assert len(levels) == (2**bits - 1 if grid.kind == "signed" else 2**bits)
    x = torch.randn(500, dtype=torch.float64)
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(quantize(x, alpha, width, grid), nearest, rtol=0, atol=1e-15)


def test_two_bits_signed_is_ternary() -> None:
    x = torch.linspace(-2, 2, 41)
    assert quantize(x, torch.tensor([1.5]), torch.tensor([2.0]), SIGNED).unique().tolist() == [-1.5, 0.0, 1.5]


def test_rounding_is_half_to_even_by_true_division() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert integer_codes(x, torch.tensor(1.0), -8, 8).tolist() == [0, 2, 2, 0, -2]
    # Multiplying by the reciprocal gives another quantizer: some codes at half a step differ.
    step = torch.tensor([0.3])
    halves = (torch.arange(2000) + 0.5) * step
    assert not torch.equal(torch.round(halves * (1 / step)), integer_codes(halves, step, -1e6, 1e6))


def test_half_precision_input_is_rounded_once() -> None:
    step = torch.tensor(0.013)  # without dimensions, which would not widen x by itself
    x = torch.linspace(-4, 4, 5001).bfloat16()
    assert torch.equal(integer_codes(x, step, -999, 999), integer_codes(x.float(), step, -999, 999))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_type_of_the_input_is_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([0.4, 3.0], dtype=dtype, requires_grad=True)
    alpha, bits = torch.tensor([1.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    y = quantize(x, alpha, bits, SIGNED)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert alpha.grad is not None
    assert bits.grad is not None
    assert (x.grad.dtype, alpha.grad.dtype, bits.grad.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
@pytest.mark.parametrize("bits_value", [2.0, 3.0, 4.5, 8.0])
def test_gradients_equal_table_1_4(grid: Grid, bits_value: float) -> None:
    """d/dx, d/d alpha and d/d bits element by element, LSQ column, ends included."""
    alpha = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    bits = torch.tensor([bits_value], dtype=torch.float64, requires_grad=True)
    lower, upper = (float(end) for end in value_range(alpha.detach(), bits.detach(), grid))
    x = torch.linspace(-2, 2, 37, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([lower, upper, 0.0], dtype=torch.float64)]).requires_grad_()
    step = step_size(alpha, bits, grid)
    error = ((quantize(x, alpha, bits, grid) - x) / step).detach()
    step_by = torch.autograd.grad(step, (alpha, bits))
    lower_by, upper_by = (
        torch.autograd.grad(end + 0 * (alpha + bits), (alpha, bits), retain_graph=True)
        for end in value_range(alpha, bits, grid)
    )
    for i, value in enumerate(x.tolist()):
        got = torch.autograd.grad(quantize(x, alpha, bits, grid)[i], (x, alpha, bits))
        if value >= upper:
            want = [0.0, *(g.item() for g in upper_by)]
        elif value <= lower:
            want = [0.0, *(g.item() for g in lower_by)]
        else:
            want = [1.0, *(error[i].item() * g.item() for g in step_by)]
        assert got[0][i].item() == want[0]
        assert got[0].abs().sum().item() == want[0]  # no other element is touched
        assert got[1].item() == pytest.approx(want[1], abs=1e-15)
        assert got[2].item() == pytest.approx(want[2], abs=1e-15)


def test_gradient_reaches_each_channel_of_alpha() -> None:
    x = torch.full((2, 3), 5.0)
    alpha = torch.tensor([[1.0], [2.0]], requires_grad=True)
    quantize(x, alpha, torch.tensor([4.0]), SIGNED).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [[3.0], [3.0]]


def test_an_empty_tensor_passes() -> None:
    x = torch.empty(0, 3, requires_grad=True)
    quantize(x, torch.tensor([1.0]), torch.tensor([4.0]), SIGNED).sum().backward()
    assert x.grad is not None


# ---------------------------------------------------------------------- truncation


LOWER, UPPER = torch.tensor([-1.0]), torch.tensor([2.0])
X = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0, 5.0])


def test_values_and_mask() -> None:
    assert truncate(X, LOWER, UPPER).tolist() == [-1.0, -1.0, -0.5, 0.0, 2.0, 2.0]
    assert inside_range(X, LOWER, UPPER).tolist() == [0, 0, 1, 1, 0, 0]
    assert X.tolist() == [-3.0, -1.0, -0.5, 0.0, 2.0, 5.0]  # neither writes to its input


def test_gradients_go_to_x_step_and_the_nearer_end() -> None:
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    slope = torch.tensor([9.0, 9.0, 0.5, -0.25, 9.0, 9.0])
    got = truncation_gradients(grad, X, slope, (LOWER, UPPER), torch.tensor([0.1]), (True,) * 4)
    assert [None if g is None else g.tolist() for g in got] == [[0, 0, 3, 4, 0, 0], [0.5], [3], [11]]


def test_only_what_is_needed_is_computed() -> None:
    got = truncation_gradients(X, X, X, (LOWER, UPPER), torch.tensor([0.1]), (False, True, False, False))
    assert [g is None for g in got] == [True, False, True, True]
