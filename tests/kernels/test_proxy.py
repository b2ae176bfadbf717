"""The fused noise proxy gives the numbers of the plain one: values to the bit, gradients to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu6

from nipq.config import NoiseKind
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import BALANCED, SIGNED, UNSIGNED, Grid
from nipq.functional.noise import error_table
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.cpu import library
from nipq.kernels.dispatch import backend, noise_proxy, plain_noise_proxy
from nipq.kernels.dispatch import fused_noise_proxy as fused_noise_proxy_on

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

GRIDS = [SIGNED, UNSIGNED, Grid("shifted", 0.375), BALANCED]
RANGE = tuple(range(2, 9))


def fused_noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    kernels = backend(x, tensors.alpha_raw, settings.channel_axis)
    assert kernels is not None
    return fused_noise_proxy_on(x, tensors, settings, kernels)


def settings(grid: Grid = SIGNED, choices: tuple[int, ...] = RANGE, **other: float) -> ProxySettings:
    return ProxySettings(grid, choices[0] - 0.5, choices[-1] + 0.5, choices, **{"stochastic": True, **other})


def parameters(channels: int = 1, raw: float = 0.3) -> ProxyTensors:
    alpha_raw = (torch.randn(channels) + 1.5).requires_grad_()
    return ProxyTensors(alpha_raw, draw_key("cpu"), bit_raw=torch.tensor([raw], requires_grad=True))


def outcome(function, x: Tensor, grad: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> list[Tensor]:
    """Value, and the gradients of x, alpha_raw and bit_raw."""
    leaf = x.detach().clone().requires_grad_()
    inputs = [part for part in (leaf, tensors.alpha_raw, tensors.bit_raw) if part is not None]
    y = function(leaf, tensors, chosen)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def assert_equal(x: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> None:
    grad = torch.randn_like(x)
    fused, plain = (outcome(function, x, grad, tensors, chosen) for function in (fused_noise_proxy, plain_noise_proxy))
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    assert fused[0].stride() == x.stride()
    scale = grad.abs().sum().item()  # sums of terms of either sign: relative to what was added up
    for ours, theirs in zip(fused[2:], plain[2:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize(
    ("shape", "axis", "channels"),
    [
        ((1,), 0, 1),
        ((511,), 0, 1),
        ((70_001,), 0, 1),
        ((3, 5, 7), 0, 1),
        ((8, 5, 3, 3), 0, 8),
        ((6, 8, 5, 5), 1, 8),
        ((4, 33), 0, 4),
    ],
)
def test_values_and_gradients_are_those_of_plain_operations(
    grid: Grid, shape: tuple[int, ...], axis: int, channels: int
) -> None:
    assert_equal(2 * torch.randn(shape), parameters(channels), settings(grid, channel_axis=axis))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
def test_channels_last_and_strided_inputs(grid: Grid) -> None:
    x = torch.randn(4, 16, 6, 5)
    assert_equal(x.to(memory_format=torch.channels_last), parameters(), settings(grid))
    assert_equal(x.to(memory_format=torch.channels_last), parameters(4), settings(grid, channel_axis=0))
    tensors = parameters()
    strided = fused_noise_proxy(x[:, ::2], tensors, settings(grid))
    assert torch.equal(strided, plain_noise_proxy(x[:, ::2].contiguous(), tensors, settings(grid)))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("choices", [RANGE, (2, 4, 8), (3, 16), (2, 3), (5,)])
def test_the_bit_width_is_drawn_alike(choices: tuple[int, ...], stochastic: bool) -> None:
    x = torch.randn(100)
    for raw in (-9.0, -1.7, -0.4, 0.0, 0.6, 2.2, 9.0):
        for _ in range(5):
            assert_equal(x, parameters(raw=raw), settings(choices=choices, stochastic=stochastic))


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_a_fixed_bit_width(bits: int) -> None:
    tensors = replace(parameters(), bit_raw=None, bits_frozen=torch.tensor([bits]))
    for grid in GRIDS:
        assert_equal(torch.randn(1000), tensors, settings(grid))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
def test_empirical_noise_from_a_table(grid: Grid) -> None:
    x, bits = torch.randn(6, 9, 4, 4), torch.tensor([3.0])
    tensors = parameters()
    table = error_table(x, tensors.alpha_raw.detach().exp(), bits, grid)
    tensors = replace(tensors, bits=bits, table=table.errors, table_count=table.inside)
    assert_equal(x, tensors, settings(grid))
    empty = replace(tensors, table_count=torch.tensor([0]))
    assert_equal(x, empty, settings(grid))


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    """In-range results that fall on an end move by one number of the type; all others are equal to the bit."""
    x = (2 * torch.randn(50_000)).bfloat16()
    tensors, chosen = parameters(), settings()
    grad = torch.randn_like(x)
    fused, plain = (outcome(function, x, grad, tensors, chosen) for function in (fused_noise_proxy, plain_noise_proxy))
    differ = fused[0] != plain[0]
    alpha = torch.nn.functional.softplus(tensors.alpha_raw).bfloat16()
    assert differ.float().mean() < 0.02
    assert (plain[0][differ].abs() == alpha).all()
    assert torch.equal(fused[0][differ].view(torch.int16) + 1, plain[0][differ].view(torch.int16))  # towards zero
    assert torch.equal(fused[1], plain[1])
    for ours, theirs in zip(fused[2:], plain[2:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * grad.abs().sum().item())


def test_an_in_range_result_on_an_end_is_moved_off_it_so_that_backward_sees_it_in_range() -> None:
    """x such that x + noise * step is the boundary itself."""
    tensors = replace(parameters(), bit_raw=None, bits_frozen=torch.tensor([2]))
    chosen = settings(UNSIGNED)
    base = torch.full((4000,), float(torch.nn.functional.softplus(tensors.alpha_raw.detach().double())))
    moved = (plain_noise_proxy(base * 0.5, tensors, chosen) - base * 0.5).detach()
    x = base - moved  # in range where the noise is positive
    y = plain_noise_proxy(x, tensors, chosen).detach()
    on_the_end = (y == base) & (x < base)
    assert on_the_end.sum() > 100
    fused = outcome(fused_noise_proxy, x, torch.ones_like(x), tensors, chosen)
    assert (fused[0][on_the_end] == torch.nextafter(base, torch.zeros(1))[on_the_end]).all()
    assert torch.equal(fused[1], ((x > 0) & (x < base)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raw", [1.0, 5.9, 9.0])
def test_the_cap_of_a_relu6_that_was_left_out(raw: float, dtype: torch.dtype) -> None:
    """The proxy of relu6(x), value and gradients, from x itself; the boundary lies below the cap, at it, above it."""
    x, grad = (4 * torch.randn(20_000)).to(dtype), torch.randn(20_000).to(dtype)
    tensors = replace(parameters(), alpha_raw=torch.tensor([raw], requires_grad=True))
    fused = outcome(fused_noise_proxy, x, grad, tensors, settings(UNSIGNED, cap=6.0))
    expected = outcome(lambda x, *rest: fused_noise_proxy(relu6(x), *rest), x, grad, tensors, settings(UNSIGNED))
    plain = outcome(plain_noise_proxy, x, grad, tensors, settings(UNSIGNED, cap=6.0))
    # Off by one number of the type where the result of an uncapped element would pass for that of a capped one.
    moved = fused[0] != expected[0]
    assert moved.float().mean() < (0 if dtype == torch.float32 else 0.02) + 1e-9
    assert (fused[0] - expected[0]).abs().max() <= 6 * torch.finfo(dtype).eps
    assert torch.equal(fused[1], expected[1])
    assert torch.equal(fused[1], plain[1])
    for ours, theirs in zip(fused[2:], expected[2:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * grad.abs().sum().item())


def test_zeros_behind_a_relu_stay_zero_and_get_no_gradient() -> None:
    x = torch.relu(torch.randn(1000))
    y, dx, *_ = outcome(fused_noise_proxy, x, torch.ones(1000), parameters(), settings(UNSIGNED))
    assert torch.equal(y[x == 0], x[x == 0])
    assert not dx[x == 0].any()
    assert (dx[x > 0] + (y[x > 0] >= y.max()) > 0).all()


def test_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.1])
    tensors = parameters()
    fused, plain = (function(x, tensors, settings()) for function in (fused_noise_proxy, plain_noise_proxy))
    assert torch.equal(fused.nan_to_num(99), plain.nan_to_num(99))
    assert fused[0].isnan()


def test_an_empty_tensor() -> None:
    y, dx, d_alpha, d_bits = outcome(fused_noise_proxy, torch.empty(0, 3), torch.empty(0, 3), parameters(), settings())
    assert y.shape == dx.shape == (0, 3)
    assert (float(d_alpha), float(d_bits)) == (0, 0)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    x, grad, tensors = torch.randn(300_000), torch.randn(300_000), parameters()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(outcome(fused_noise_proxy, x, grad, tensors, settings()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_is_kept_but_the_result() -> None:
    """The layer behind keeps its input anyway, and its input is the result."""
    kept: list[Tensor] = []
    x = torch.randn(1000, requires_grad=True)
    tensors = parameters()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused_noise_proxy(x, tensors, settings())
    large = [t for t in kept if t.numel() > 1]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]


def test_a_parameter_changed_before_backward_is_noticed() -> None:
    x, tensors = torch.randn(10, requires_grad=True), parameters()
    y = fused_noise_proxy(x, tensors, settings())
    with torch.no_grad():
        tensors.alpha_raw.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("cap", [float("inf"), 0.7])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
def test_a_gradient_of_the_gradient_is_that_of_plain_operations(grid: Grid, cap: float) -> None:
    x, tensors, chosen = 2 * torch.randn(200), parameters(), settings(grid, cap=cap)
    weight = torch.randn(200)
    found = []
    for function in (fused_noise_proxy, plain_noise_proxy):
        leaf = x.clone().requires_grad_()
        inputs = (leaf, tensors.alpha_raw, tensors.bit_raw)
        first = torch.autograd.grad((function(leaf, tensors, chosen) ** 3 * weight).sum(), inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum((part**2).sum() for part in first), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_there_is_no_kernel_for() -> None:
    one = torch.zeros(1)
    assert backend(torch.zeros(3), one, 0) is not None
    assert backend(torch.zeros(3, dtype=torch.float64), one, 0) is None
    assert backend(torch.zeros(3, dtype=torch.float16), one, 0) is None
    assert backend(torch.zeros(3), one.bfloat16(), 0) is None
    assert backend(torch.zeros(3, device="meta"), one, 0) is None
    assert backend(torch.zeros(5, 4, 2, 2).to(memory_format=torch.channels_last), torch.zeros(4), 1) is None


# ------------------------------------------------------------------------------------------------- the dispatch


def made_by_kernels(x: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> bool:
    node = noise_proxy(x.requires_grad_(), tensors, chosen).grad_fn
    assert node is not None
    return type(node).__name__ == "_FusedProxyBackward"


@pytest.mark.parametrize("noise", get_args(NoiseKind))
def test_fused_kernels_serve_the_noise_that_they_have(noise: NoiseKind) -> None:
    fused = noise in ("uniform", "empirical")
    assert made_by_kernels(torch.randn(50), parameters(), replace(settings(), noise=noise)) == fused


@pytest.mark.parametrize("switch", ["clip_after_noise", "range_correction"])
def test_plain_operations_do_what_no_kernel_does(switch: str) -> None:
    assert not made_by_kernels(torch.randn(50), parameters(), replace(settings(), **{switch: True}))
    assert not made_by_kernels(torch.randn(50, dtype=torch.float64), parameters(), settings())
    mixed = replace(parameters(), error_share=torch.tensor([0.5]))
    assert not made_by_kernels(torch.randn(50), mixed, settings())


@pytest.mark.parametrize("noise", ["uniform", "empirical"])
def test_either_way_gives_the_same_numbers(noise: NoiseKind, monkeypatch: pytest.MonkeyPatch) -> None:
    x, tensors, chosen = torch.randn(9000), parameters(), replace(settings(), noise=noise)
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr("nipq.kernels.dispatch.backend", lambda *_: None)
        torch.manual_seed(3)  # of the elements that an error table is made from
        found.append(noise_proxy(x, tensors, chosen))
    assert torch.equal(*found)


def test_not_a_number_passes_no_gradient_and_stays_visible() -> None:
    x, grad = torch.tensor([float("nan"), 0.3]), torch.ones(2)
    for function in (fused_noise_proxy, plain_noise_proxy):
        y, d_x, *others = outcome(function, x, grad, parameters(), settings())
        assert y[0].isnan()
        assert d_x.tolist() == [0, 1]
        assert all(bool(other.isfinite().all()) for other in others)
