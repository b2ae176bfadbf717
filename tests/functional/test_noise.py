"""The kinds of noise: range, distribution, layout."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from nipq.config import NoiseKind
from nipq.errors import ConfigError
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED
from nipq.functional.noise import (
    draw_noise,
    gaussian_noise,
    stochastic_noise,
    tempered,
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


def test_tempering_leads_from_the_noise_to_the_true_quantizer() -> None:
    x, alpha, bits = torch.linspace(-4, 4, 101), torch.tensor([3.0]), torch.tensor([3.0])
    noise, error = uniform_noise(x), true_error(x, alpha, bits, SIGNED)
    assert torch.equal(tempered(noise, error, 0.0), noise)
    at_the_end = noise_proxy(x, alpha, bits, tempered(noise, error, 1.0), SIGNED)
    assert torch.allclose(at_the_end, quantize(x, alpha, bits, SIGNED), atol=1e-6)


@pytest.mark.parametrize("kind", get_args(NoiseKind))
def test_every_kind_of_noise_has_the_shape_and_type_of_the_tensor(kind: NoiseKind) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    noise = draw_noise(kind, x, torch.tensor([1.0]), torch.tensor([3.0]), SIGNED, draw_key("cpu"))
    assert (noise.shape, noise.dtype, noise.requires_grad) == (x.shape, x.dtype, False)


def test_an_unknown_kind_of_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a kind of noise out of uniform, .*found 'pink'"):
        draw_noise("pink", torch.zeros(1), torch.ones(1), 3, SIGNED, draw_key("cpu"))  # type: ignore[arg-type]
