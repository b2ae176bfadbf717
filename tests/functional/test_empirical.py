"""Empirical noise: the distribution of the tensor's own errors, and what happens with nothing in range."""

from __future__ import annotations

import pytest
import torch

from nipq.errors import ConfigError
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED, UNSIGNED, Grid, step_size, value_range
from nipq.functional.noise import ERROR_TABLE, EmpiricalMethod, ErrorTable, empirical_noise, error_table, table_noise
from nipq.functional.uniform import quantize

METHODS: list[EmpiricalMethod] = ["table", "histogram"]
KOLMOGOROV = 2.5  # times 1/sqrt(N): exceeded with probability 7e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(s.sort().values, at, right=True) / s.numel() for s in (a, b)]
    return float((below[0] - below[1]).abs().max())


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
