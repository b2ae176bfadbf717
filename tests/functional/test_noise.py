"""The kinds of noise: range, distribution, layout; and the distribution of a tensor's own errors."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from nipq.config import NoiseKind
from nipq.errors import ConfigError
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED, UNSIGNED, Grid, step_size, value_range
from nipq.functional.noise import (
    ERROR_TABLE,
    EmpiricalMethod,
    ErrorTable,
    draw_noise,
    empirical_noise,
    error_table,
    gaussian_noise,
    mixed_noise,
    stochastic_noise,
    table_noise,
    true_error,
    uniform_noise,
)
from nipq.functional.proxy import noise_proxy
from nipq.functional.uniform import quantize

KOLMOGOROV = 2.5  # times 1/sqrt(N): exceeded with probability 7e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(s.sort().values, at, right=True) / s.numel() for s in (a, b)]
    return float((below[0] - below[1]).abs().max())


def test_uniform_noise_is_uniform() -> None:
    noise = uniform_noise(torch.empty(400_001), generator())
    assert noise.abs().max() <= 0.5
    assert noise.mean().abs() < 5 * (1 / 12 / 400_001) ** 0.5
    assert noise.var().item() == pytest.approx(1 / 12, rel=5e-3)
    assert distance(noise, torch.linspace(-0.5, 0.5, 400_001)) < KOLMOGOROV / 400_001**0.5


def test_uniform_noise_is_independent_between_neighbours() -> None:
    noise = uniform_noise(torch.empty(4, 100_000).T, generator())
    for lag in range(1, 9):
        a, b = noise.flatten()[:-lag], noise.flatten()[lag:]
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / 400_000**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4, 5)])
def test_uniform_noise_has_the_shape_and_type_of_x(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    noise = uniform_noise(x)
    assert (noise.shape, noise.dtype, noise.requires_grad) == (x.shape, dtype, False)


def test_uniform_noise_keeps_the_layout_of_x() -> None:
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    noise = uniform_noise(x)
    assert noise.stride() == x.stride()
    assert noise.unique().numel() > 100


def test_noise_follows_the_generator_and_leaves_the_global_one_alone() -> None:
    x = torch.linspace(-1, 1, 100)
    before = torch.get_rng_state()
    assert torch.equal(uniform_noise(x, generator(1)), uniform_noise(x, generator(1)))
    assert not torch.equal(uniform_noise(x, generator(1)), uniform_noise(x, generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- beyond the paper


def test_gaussian_noise_has_half_a_step_of_deviation() -> None:
    noise = gaussian_noise(torch.zeros(100_000), torch.Generator().manual_seed(0))
    assert abs(float(noise.mean())) < 5 * 0.5 / 100_000**0.5
    assert float(noise.std()) == pytest.approx(0.5, abs=5 * 0.5 / 200_000**0.5)


def test_stochastic_noise_lands_on_a_level_and_keeps_the_mean() -> None:
    alpha, bits = torch.tensor([3.0]), torch.tensor([3.0])  # step 1
    x = torch.full((100_000,), 1.3)
    landed = x + stochastic_noise(x, alpha, bits, SIGNED, generator=torch.Generator().manual_seed(0))
    assert sorted(set(landed.round(decimals=5).tolist())) == [1.0, 2.0]
    assert float(landed.mean()) == pytest.approx(1.3, abs=5 * (0.3 * 0.7 / 100_000) ** 0.5)
    assert float(stochastic_noise(torch.tensor([2.0, -1.0, 0.0]), alpha, bits, SIGNED).abs().max()) == 0


def test_the_mix_leads_from_the_noise_to_the_true_quantizer() -> None:
    x, alpha, bits = torch.linspace(-4, 4, 101), torch.tensor([3.0]), torch.tensor([3.0])
    noise, error = uniform_noise(x), true_error(x, alpha, bits, SIGNED)
    assert torch.equal(mixed_noise(noise, error, 0.0), noise)
    at_the_end = noise_proxy(x, alpha, bits, mixed_noise(noise, error, 1.0), SIGNED)
    assert torch.allclose(at_the_end, quantize(x, alpha, bits, SIGNED), atol=1e-6)


@pytest.mark.parametrize("kind", get_args(NoiseKind))
def test_every_kind_of_noise_has_the_shape_and_type_of_the_tensor(kind: NoiseKind) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    noise = draw_noise(kind, x, torch.tensor([1.0]), torch.tensor([3.0]), SIGNED, draw_key("cpu"))
    assert (noise.shape, noise.dtype, noise.requires_grad) == (x.shape, x.dtype, False)


def test_an_unknown_kind_of_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a kind of noise out of uniform, .*found 'pink'"):
        draw_noise("pink", torch.zeros(1), torch.ones(1), 3, SIGNED, draw_key("cpu"))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- empirical noise


METHODS: list[EmpiricalMethod] = ["table", "histogram"]


def true_errors(x: torch.Tensor, alpha: torch.Tensor, bits: torch.Tensor, grid: Grid) -> torch.Tensor:
    lower, upper = value_range(alpha, bits, grid)
    return ((quantize(x, alpha, bits, grid) - x) / step_size(alpha, bits, grid))[(x > lower) & (x < upper)]


@pytest.mark.parametrize("method", METHODS)
def test_empirical_noise_follows_the_generator_and_leaves_the_global_one_alone(method: EmpiricalMethod) -> None:
    x, alpha, bits = torch.linspace(-1, 1, 9000), torch.tensor([1.0]), torch.tensor([3.0])
    before = torch.get_rng_state()
    first, again, other = (
        empirical_noise(x, alpha, bits, SIGNED, method=method, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_tensor_is_in_the_table_whole_with_the_boundary_of_each_channel() -> None:
    x = torch.randn(6, 5, 4, 4).to(memory_format=torch.channels_last)
    alpha, bits = torch.linspace(0.5, 2, 5).reshape(1, 5, 1, 1), torch.tensor([3.0])
    table = error_table(x, alpha, bits, SIGNED)
    expected = torch.cat([true_errors(x[:, [c]], alpha[:, [c]], bits, SIGNED) for c in range(5)])
    assert int(table.inside) == expected.numel()
    assert torch.allclose(table.errors[: expected.numel()].sort().values, expected.sort().values, atol=1e-6)
    assert not table.errors[expected.numel() :].any()


def test_a_large_tensor_is_picked_from() -> None:
    table = error_table(torch.randn(50_000), torch.tensor([1.0]), torch.tensor([3.0]), SIGNED)
    assert table.errors.shape == (ERROR_TABLE,)
    assert int(table.inside) == pytest.approx(0.6827 * ERROR_TABLE, abs=5 * (ERROR_TABLE * 0.6827 * 0.3173) ** 0.5)


def test_every_entry_of_a_table_is_drawn_as_often_as_any_other_and_the_rest_never() -> None:
    errors = torch.arange(8.0)
    x = torch.empty(60_000)
    drawn = table_noise(x, ErrorTable(errors, torch.tensor([5])), draw_key("cpu"))
    counts = torch.bincount(drawn.long(), minlength=8)
    assert not counts[5:].any()
    assert (counts[:5] - 12_000).abs().max() < 5 * (60_000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED, Grid("shifted", 0.375)], ids=lambda g: g.kind)
@pytest.mark.parametrize("bits_value", [2.0, 4.0])
def test_empirical_noise_has_the_distribution_of_the_errors(
    method: EmpiricalMethod, grid: Grid, bits_value: float
) -> None:
    x = torch.randn(100_000, generator=generator(), dtype=torch.float64)
    alpha, bits = torch.tensor([2.0], dtype=torch.float64), torch.tensor([bits_value], dtype=torch.float64)
    errors = true_errors(x, alpha, bits, grid)
    noise = empirical_noise(x, alpha, bits, grid, method=method, generator=generator(1))
    # The histogram spreads a bin's errors evenly over the bin: up to one bin's share more.
    # A table of m = 4,096 is nowhere farther than KOLMOGOROV / sqrt(m) from all errors, but for a chance of 7e-6.
    spread = (
        KOLMOGOROV / 4096**0.5
        if method == "table"
        else torch.histc(errors, 256, -0.5, 0.5).max().item() / errors.numel()
    )
    assert distance(noise, errors) < KOLMOGOROV / 100_000**0.5 + spread
    assert noise.abs().max() <= 0.5


@pytest.mark.parametrize("method", METHODS)
def test_empirical_noise_of_settled_weights_is_no_noise(method: EmpiricalMethod) -> None:
    """Where uniform noise is wrong: weights on the grid make no error at all."""
    x = torch.arange(-3.0, 4.0).repeat(50) * 0.5
    noise = empirical_noise(x, torch.tensor([1.5]), torch.tensor([3.0]), SIGNED, method=method)
    assert noise.abs().max() <= (0 if method == "table" else 1 / 256)


def test_noise_from_the_table_ignores_the_place_and_the_truncated() -> None:
    x = torch.tensor([0.25, 9.0, -9.0, 1.4]).repeat(1000)  # on a grid of step 1: errors -0.25 and -0.4
    noise = empirical_noise(x, torch.tensor([3.0]), torch.tensor([3.0]), SIGNED, generator=generator())
    assert noise.unique().numel() == 2
    for place in range(4):
        share = (noise[place::4] < -0.3).double().mean().item()
        assert abs(share - 0.5) < 5 * (0.25 / 1000) ** 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "grid"),
    [(torch.zeros(20_000), UNSIGNED), (-torch.rand(20_000), UNSIGNED), (torch.full((20_000,), 9.0), SIGNED)],
    ids=["all zero after a ReLU", "all negative", "all truncated"],
)
def test_with_nothing_in_range_empirical_noise_is_uniform(method: EmpiricalMethod, x: torch.Tensor, grid: Grid) -> None:
    noise = empirical_noise(x, torch.tensor([1.0]), torch.tensor([4.0]), grid, method=method, generator=generator())
    assert distance(noise, torch.linspace(-0.5, 0.5, 20_000)) < 2 * KOLMOGOROV / 20_000**0.5


@pytest.mark.parametrize("method", METHODS)
def test_empirical_noise_of_an_empty_tensor_is_empty(method: EmpiricalMethod) -> None:
    noise = empirical_noise(torch.empty(0, 3), torch.tensor([1.0]), torch.tensor([4.0]), SIGNED, method=method)
    assert noise.shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_empirical_noise_keeps_shape_and_type_with_a_boundary_for_each_channel(
    method: EmpiricalMethod, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 7, generator=generator()).to(dtype).requires_grad_()
    alpha = torch.tensor([[0.5], [1.0], [2.0]], requires_grad=True)
    noise = empirical_noise(x, alpha, torch.tensor([4.0]), SIGNED, method=method)
    assert (noise.shape, noise.dtype, noise.requires_grad) == (x.shape, dtype, False)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="method out of table, histogram; found 'gaussian'"):
        empirical_noise(torch.ones(2), torch.ones(1), torch.tensor([4.0]), SIGNED, method="gaussian")  # type: ignore[arg-type]
