"""The noise proxy: values, gradients, and the boundary correction."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nipq.functional import theory
from nipq.functional.bitwidth import round_bits, stochastic_round_bits
from nipq.functional.grid import BALANCED, FULL, SIGNED, UNSIGNED, Grid, step_size, value_range, zero_point
from nipq.functional.noise import empirical_noise, uniform_noise
from nipq.functional.proxy import noise_proxy
from nipq.functional.uniform import quantize

HSWISH = Grid("shifted", 0.375)
GRIDS = [SIGNED, UNSIGNED, HSWISH, BALANCED, FULL]
by_kind = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written_out(x: Tensor, alpha: Tensor, bits: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """The definition of the proxy, word by word."""
    lower, upper = value_range(alpha, bits, grid)
    inside = x + noise * step_size(alpha, bits, grid)
    return torch.where(x >= upper, upper, torch.where(x <= lower, lower, inside))


@by_kind
@pytest.mark.parametrize("bits_value", [2.0, 3.3, 8.0])
def test_value_is_the_definition(grid: Grid, bits_value: float) -> None:
    x, noise = torch.randn(1000, generator=generator()), uniform_noise(torch.empty(1000))
    alpha, bits = torch.tensor([1.5]), torch.tensor([bits_value])
    torch.testing.assert_close(
        noise_proxy(x, alpha, bits, noise, grid), written_out(x, alpha, bits, noise, grid), rtol=0, atol=2.5e-7
    )


def test_relu_zeros_stay_zeros_and_truncated_values_are_alpha() -> None:
    x, noise = torch.tensor([-1.0, 0.0, 2.0, 7.0]), torch.full((4,), 0.5)
    assert noise_proxy(x, torch.tensor([2.0]), torch.tensor([2.0]), noise, UNSIGNED).tolist() == [0, 0, 2, 2]
    assert noise_proxy(x * 9, torch.tensor([2.0]), torch.tensor([2.0]), noise, SIGNED)[[0, 2, 3]].tolist() == [-2, 2, 2]


def test_noise_leaves_the_range_by_at_most_half_a_step_and_clipping_prevents_it() -> None:
    """Reference: signed, 3 bits, alpha 2 reaches 2.32 (half a step is 0.33)."""
    x = 2 * torch.randn(100_000, generator=generator())
    noise = uniform_noise(x, generator(1))
    alpha, bits = torch.tensor([2.0]), torch.tensor([3.0])
    top = noise_proxy(x, alpha, bits, noise, SIGNED).max().item()
    assert 2.3 < top <= 2 + 1 / 3
    bottom = noise_proxy(x, alpha, bits, noise, UNSIGNED).min().item()
    assert -1 / 7 <= bottom < -0.1
    for grid in GRIDS:
        lower, upper = value_range(alpha, bits, grid)
        clipped = noise_proxy(x, alpha, bits, noise, grid, clip_after_noise=True)
        assert torch.equal(clipped, noise_proxy(x, alpha, bits, noise, grid).clamp(lower, upper))


@by_kind
@pytest.mark.parametrize("bits_value", [2.0, 3.0, 4.5, 8.0])
@pytest.mark.parametrize("clip", [False, True])
def test_t10_gradients_equal_finite_differences_at_fixed_noise(grid: Grid, bits_value: float, clip: bool) -> None:
    x = 1.5 * torch.randn(300, generator=generator(), dtype=torch.float64)
    noise = uniform_noise(x, generator(1))
    alpha, bits = f64(1.7), f64(bits_value)
    if grid.kind == "shifted":  # away from the jumps of the whole zero point, where no derivative exists
        assert torch.equal(zero_point(alpha - 1e-5, bits, grid), zero_point(alpha + 1e-5, bits, grid))
    weights = torch.randn(300, generator=generator(2), dtype=torch.float64)

    def loss(*arguments: Tensor) -> Tensor:
        x, alpha, bits = arguments
        return (weights * noise_proxy(x, alpha, bits, noise, grid, clip_after_noise=clip)).sum()

    arguments = [x.clone().requires_grad_(), alpha.clone().requires_grad_(), bits.clone().requires_grad_()]
    got = torch.autograd.grad(loss(*arguments), arguments)
    h = 1e-6
    for i in (1, 2):
        shifted = [[a + h * sign * (i == j) for j, a in enumerate((x, alpha, bits))] for sign in (1, -1)]
        if i == 2 and bits_value == 2:  # below two bits there is no grid: a one-sided difference
            shifted[1] = [x, alpha, bits]
        slope = (loss(*shifted[0]) - loss(*shifted[1])) / (shifted[0][i] - shifted[1][i])
        assert got[i].item() == pytest.approx(slope.item(), abs=2e-4 if i == 2 and bits_value == 2 else 1e-7)
    plus, minus = (noise_proxy(x + s, alpha, bits, noise, grid, clip_after_noise=clip) for s in (h, -h))
    torch.testing.assert_close(got[0], weights * (plus - minus) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bits_value", [2.0, 4.0])
def test_gradients_at_the_high_end_of_a_full_grid(bits_value: float) -> None:
    """The highest level is alpha - step: it moves by 1 - 1/n with alpha and by -d step / d bits with the bits."""
    alpha, bits = f64(1.3).requires_grad_(), f64(bits_value).requires_grad_()
    x, noise = f64(5.0, -5.0), f64(0.25, 0.25)
    high, low = noise_proxy(x, alpha, bits, noise, FULL)
    n = 2 ** (bits_value - 1)
    assert (high.item(), low.item()) == (pytest.approx(1.3 * (1 - 1 / n)), pytest.approx(-1.3))
    of_high = torch.autograd.grad(high, (alpha, bits), retain_graph=True)
    assert of_high[0].item() == pytest.approx(1 - 1 / n)
    assert of_high[1].item() == pytest.approx(1.3 * math.log(2) / n)
    assert [x.item() for x in torch.autograd.grad(low, (alpha, bits), materialize_grads=True)] == [-1, 0]


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=lambda g: g.kind)  # the full one's high end is held above
@pytest.mark.parametrize("bits_value", [2.0, 4.0, 5.3])
def test_t10_gradients_equal_table_1_4(grid: Grid, bits_value: float) -> None:
    """Element by element, with elements exactly on the ends, to 1e-15."""
    alpha, bits = f64(1.3).requires_grad_(), f64(bits_value).requires_grad_()
    lower, upper = (float(end) for end in value_range(alpha.detach(), bits.detach(), grid))
    x = torch.cat([torch.linspace(-2, 2, 31, dtype=torch.float64), f64(lower, upper, 0.0)]).requires_grad_()
    noise = uniform_noise(x, generator())
    step_by = torch.autograd.grad(step_size(alpha, bits, grid), (alpha, bits))
    n = (alpha / step_size(alpha, bits, grid)).item()
    z = zero_point(alpha, bits, grid).item()
    lowest_by_alpha = -z / n if grid.kind in ("unsigned", "shifted") else -1.0
    assert step_by[1].item() == pytest.approx(theory.step_slope(1.3, bits_value, grid).item(), rel=1e-14)
    for i, value in enumerate(x.tolist()):
        got = torch.autograd.grad(noise_proxy(x, alpha, bits, noise, grid)[i], (x, alpha, bits))
        if value >= upper:
            want = (0.0, 1 - z / n, -z * step_by[1].item())
        elif value <= lower:
            want = (0.0, lowest_by_alpha, -z * step_by[1].item())
        else:
            want = (1.0, noise[i].item() / n, noise[i].item() * step_by[1].item())
        assert got[0][i].item() == want[0]
        assert got[1].item() == pytest.approx(want[1], abs=1e-15)
        assert got[2].item() == pytest.approx(want[2], abs=1e-15)


@by_kind
def test_with_the_true_error_for_noise_the_proxy_is_the_quantizer(grid: Grid) -> None:
    """The key identity of section 5.2, in value and in all three gradients."""
    x = 2 * torch.randn(500, generator=generator(), dtype=torch.float64)
    arguments = [x.requires_grad_(), f64(1.9).requires_grad_(), f64(3.0).requires_grad_()]
    rounded = quantize(*arguments, grid)
    lower, upper = value_range(*arguments[1:], grid)
    error = ((rounded - x) / step_size(*arguments[1:], grid)).detach() * ((x > lower) & (x < upper))
    proxied = noise_proxy(*arguments, error, grid)
    torch.testing.assert_close(proxied, rounded, rtol=0, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad((proxied**3).sum(), arguments),
        torch.autograd.grad((rounded**3).sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED], ids=lambda g: g.kind)
def test_t9_first_two_moments(grid: Grid) -> None:
    x = torch.full((400_000,), 0.7, dtype=torch.float64)
    step = step_size(f64(2.0), f64(3.0), grid).item()
    out = noise_proxy(x, f64(2.0), f64(3.0), uniform_noise(x, generator()), grid) - 0.7
    assert abs(out.mean().item()) < 5 * step / (12 * 400_000) ** 0.5
    assert (out**2).mean().item() == pytest.approx(step**2 / 12, rel=5 * (0.8 / 400_000) ** 0.5)


def correction_gradient(x: Tensor, alpha: float, bits: float, grid: Grid, *, correct: bool, repeats: int) -> Tensor:
    """Gradients of alpha of the proxy's squared error, one for each repetition of the noise."""
    out = []
    for seed in range(repeats):
        a = f64(alpha).requires_grad_()
        y = noise_proxy(x, a, f64(bits), uniform_noise(x, generator(seed)), grid, correct_range=correct)
        out.append(torch.autograd.grad(((y - x) ** 2).mean(), a)[0])
    return torch.cat(out)


@pytest.mark.parametrize(
    ("grid", "alpha", "bits"),
    [(SIGNED, 1.0, 2.0), (SIGNED, 4.0, 2.0), (SIGNED, 2.0, 3.0), (UNSIGNED, 1.5, 2.0), (UNSIGNED, 3.0, 3.0)],
    ids=str,
)
def test_t4b_the_corrected_gradient_is_the_derivative_of_the_true_error(grid: Grid, alpha: float, bits: float) -> None:
    """Averaged over noise: the proxy's expected gradient plus exactly the missing term.

    The proxy has uniform noise of power 1/12 where the true derivative has the true error's power; that part is T3.
    """
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    h = 1e-4
    difference = (theory.true_error(x, alpha + h, bits, grid) - theory.true_error(x, alpha - h, bits, grid)) / (2 * h)
    tails = theory.sample_tails(x, alpha, grid)
    lsq = theory.proxy_gradient(tails, alpha, bits, grid, theory.error_power(x, alpha, bits, grid)).alpha
    proxy = theory.proxy_gradient(tails, alpha, bits, grid).alpha
    corrected = correction_gradient(x, alpha, bits, grid, correct=True, repeats=24)
    plain = correction_gradient(x, alpha, bits, grid, correct=False, repeats=24)
    error = (corrected.std() / 24**0.5).item()
    assert error < 2e-3  # the cap
    assert abs((corrected.mean() - (difference - lsq + proxy)).item()) < 5 * error + 1e-5
    assert abs((plain.mean() - proxy).item()) < 5 * (plain.std() / 24**0.5).item() + 1e-5


@by_kind
def test_t4b_leaves_the_value_and_the_other_gradients_alone(grid: Grid) -> None:
    x = torch.randn(200, generator=generator(), dtype=torch.float64).requires_grad_()
    alpha, bits = f64(1.2).requires_grad_(), f64(3.0).requires_grad_()
    noise = uniform_noise(x, generator(1))
    plain, corrected = (noise_proxy(x, alpha, bits, noise, grid, correct_range=c) for c in (False, True))
    assert torch.equal(plain, corrected)
    before, after = (torch.autograd.grad(y.sum(), (x, alpha, bits)) for y in (plain, corrected))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    lower, upper = value_range(alpha, bits, grid)
    inside = (x > lower) & (x < upper)
    error = quantize(x, alpha, bits, grid) - x
    coefficient = noise * error * x / (alpha * step_size(alpha, bits, grid) / 12)
    assert (after[1] - before[1]).item() == pytest.approx(coefficient[inside].sum().item(), rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@by_kind
def test_type_and_layout_are_kept_with_a_boundary_for_each_channel(dtype: torch.dtype, grid: Grid) -> None:
    x = torch.randn(2, 3, 4, 5, generator=generator()).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    alpha = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1).requires_grad_()
    bits = torch.tensor([4.0], requires_grad=True)
    y = noise_proxy(x, alpha, bits, uniform_noise(x), grid, clip_after_noise=True, correct_range=True)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    grads = torch.autograd.grad(y.float().sum(), (x, alpha, bits))
    assert [(g.dtype, g.shape) for g in grads] == [(a.dtype, a.shape) for a in (x, alpha, bits)]


def test_bits_below_two_are_refused() -> None:
    for call in (lambda b: noise_proxy(b, b, b, b, SIGNED), lambda b: quantize(b, b, b, SIGNED)):
        with pytest.raises(ValueError, match="at least 2"):
            call(torch.ones(1))


def test_an_all_zero_and_an_empty_tensor_pass() -> None:
    for x in (torch.zeros(5), torch.empty(0)):
        x.requires_grad_()
        for grid in GRIDS:
            alpha, bits = torch.tensor([1.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
            y = noise_proxy(x, alpha, bits, uniform_noise(x), grid, correct_range=True)
            for g in torch.autograd.grad(y.sum(), (x, alpha, bits)):
                assert g.isfinite().all()


def draw(x: Tensor, alpha: Tensor, bits: Tensor) -> Tensor:
    whole = stochastic_round_bits(bits, (2, 3, 4))
    first = noise_proxy(x, alpha, whole, uniform_noise(x), SIGNED, correct_range=True)
    second = noise_proxy(x, alpha, whole, empirical_noise(x, alpha, whole, UNSIGNED), UNSIGNED, clip_after_noise=True)
    return first.sum() + second.sum() + quantize(x, alpha, round_bits(bits, (2, 4, 8)), HSWISH).sum()


def test_the_training_path_compiles_without_a_break() -> None:
    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(draw, fullgraph=True, backend="aot_eager")
    arguments = [torch.randn(50), torch.ones(1), torch.tensor([3.0])]
    for a in arguments:
        a.requires_grad_()
    for g in torch.autograd.grad(compiled(*arguments), arguments):
        assert g.isfinite().all()
