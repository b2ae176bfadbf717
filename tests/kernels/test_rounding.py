"""The fused true quantizer gives the numbers of the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nipq.functional.uniform as uniform
from nipq.functional.grid import BALANCED, SIGNED, UNSIGNED, Grid
from nipq.kernels import dispatch as rounding
from nipq.kernels.cpu import library

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

GRIDS = [SIGNED, UNSIGNED, Grid("shifted", 0.2785), BALANCED]


def outcome(quantize, x: Tensor, grad: Tensor, alpha: Tensor, bits: Tensor, grid: Grid) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in (x, alpha, bits)]
    y = quantize(*leaves, grid)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("bits", [2.0, 3.0, 8.0, 13.0, 16.0])
@pytest.mark.parametrize(
    ("shape", "boundaries"), [((70_001,), (1,)), ((8, 5, 3, 3), (8, 1, 1, 1)), ((6, 8, 5, 5), (1, 8, 1, 1))]
)
def test_values_and_gradients_are_those_of_plain_operations(
    grid: Grid, bits: float, shape: tuple[int, ...], boundaries: tuple[int, ...]
) -> None:
    x, alpha = 2 * torch.randn(shape), torch.rand(boundaries) + 1
    grad = torch.randn(shape)
    args = (x, grad, alpha, torch.tensor([bits]), grid)
    fused, plain = outcome(rounding.quantize, *args), outcome(uniform.quantize, *args)
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    scale = grad.abs().sum().item()
    for ours, theirs in zip(fused[2:], plain[2:], strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


def test_ties_go_to_the_even_code_and_nan_stays() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5, float("nan"), float("inf"), -float("inf")])
    y = rounding.quantize(x, torch.tensor([3.0]), torch.tensor([3.0]), SIGNED)
    assert y[:6].tolist() == [0, 2, 2, 0, -2, 3]
    assert y[6].isnan()
    assert y[7:].tolist() == [3, -3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x, alpha, bits = torch.randn(5000).to(dtype), torch.tensor([1.7]), torch.tensor([5.0])
    expected = uniform.quantize(x.float(), alpha, bits, SIGNED).to(dtype)
    assert torch.equal(rounding.quantize(x, alpha, bits, SIGNED), expected)


def test_the_cap_of_a_relu6_that_was_left_out() -> None:
    x, grad, bits = 4 * torch.randn(5000), torch.randn(5000), torch.tensor([3.0])
    for boundary in (3.0, 6.0, 8.0):
        args = (x, grad, torch.tensor([boundary]), bits, UNSIGNED)
        found = [
            outcome(lambda x, a, b, grid: rounding.quantize(x, a, b, grid, 6.0), *args),
            outcome(lambda x, a, b, grid: uniform.quantize(torch.nn.functional.relu6(x), a, b, grid), *args),
        ]
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_gradient_of_the_gradient_is_that_of_plain_operations() -> None:
    found = []
    for quantize in (rounding.quantize, uniform.quantize):
        torch.manual_seed(0)
        leaves = [(2 * torch.randn(200)).requires_grad_(), torch.ones(1, requires_grad=True)]
        out = (quantize(*leaves, torch.tensor([3.0]), SIGNED) ** 3 * torch.randn(200)).sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum((part**2).sum() for part in first), leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_float64_goes_the_plain_way() -> None:
    x = torch.randn(50, dtype=torch.float64)
    alpha, bits = torch.ones(1, dtype=torch.float64), torch.tensor([4.0])
    assert torch.equal(rounding.quantize(x, alpha, bits, SIGNED), uniform.quantize(x, alpha, bits, SIGNED))


#: x, clipping range: quotients that overflow float32, and x that is no number.
EXTREMES = [(float("inf"), 1.0), (-float("inf"), 1.0), (3e38, 0.01), (-3e38, 0.01), (1.0, 1e-38), (float("nan"), 1.0)]


@pytest.mark.parametrize("quantize", [rounding.quantize, uniform.quantize], ids=["kernel", "plain"])
@pytest.mark.parametrize(("value", "boundary"), EXTREMES)
@pytest.mark.parametrize("grid", GRIDS[:2], ids=lambda grid: grid.kind)
def test_gradients_are_those_of_the_table_where_quotients_overflow(
    quantize, value: float, boundary: float, grid
) -> None:
    x = torch.tensor([value, 0.3 * boundary])
    grad = torch.tensor([1.0, 0.0])  # the second element is in range, and adds nothing
    args = (x, grad, torch.tensor([boundary]), torch.tensor([4.0]), grid)
    _, d_x, d_alpha, d_bits = outcome(quantize, *args)
    above, below = value > 0, value < 0 and grid.kind == "signed"
    assert d_x.tolist() == [0, 0]
    assert d_alpha.item() == pytest.approx(above - below)
    assert d_bits.item() == 0


@pytest.mark.parametrize("quantize", [rounding.quantize, uniform.quantize], ids=["kernel", "plain"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("boundary", [1e-38, 1e-30, 0.01, 1.0, 1e30, 3e38])
def test_extreme_values_give_finite_results_and_the_gradients_of_the_ends(quantize, boundary: float, grid) -> None:
    ones, alpha = torch.ones(1), torch.tensor([boundary])
    for value in (0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 3e38, -3e38, float("inf"), -float("inf")):
        for bits in (2.0, 4.0, 16.0):
            found = outcome(quantize, torch.tensor([value]), ones, alpha, torch.tensor([bits]), grid)
            assert all(bool(tensor.isfinite().all()) for tensor in found), (value, bits, found)
            if grid.kind == "shifted":
                continue
            if value >= boundary:
                assert (found[1].item(), found[2].item()) == (0, pytest.approx(1))
            if value <= (-boundary if grid.is_signed else 0):
                assert (found[1].item(), found[2].item()) == (0, pytest.approx(-1 if grid.is_signed else 0))
