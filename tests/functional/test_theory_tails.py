"""Tails by formula against tails of a sample of quantiles."""

from __future__ import annotations

import pytest
import torch

from nipq.errors import ConfigError
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.functional.theory import laplace_tails, normal_tails, sample_tails

SHARES = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
SAMPLES = {
    normal_tails: torch.special.ndtri(SHARES),
    laplace_tails: -torch.sign(SHARES - 0.5) * torch.log1p(-2 * (SHARES - 0.5).abs()),
}


@pytest.mark.parametrize("tails", [normal_tails, laplace_tails])
@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED], ids=lambda g: g.kind)
def test_formula_equals_sample(tails, grid: Grid) -> None:
    sample = SAMPLES[tails]
    sample = sample if grid == SIGNED else sample.clamp(min=0)
    for alpha in (0.3, 1.0, 2.5, 4.0):
        for exact, counted in zip(tails(alpha, grid), sample_tails(sample, alpha, grid), strict=True):
            assert counted.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-5)


def test_negative_values_on_an_unsigned_grid_cost_but_do_not_pull_the_boundary() -> None:
    tails = sample_tails(torch.tensor([-2.0, 0.0, 1.0, 5.0]), 3.0, UNSIGNED)
    assert [t.item() for t in tails] == [0.25, 0.5, 2.0]


@pytest.mark.parametrize("tails", [normal_tails, laplace_tails, lambda a, g: sample_tails(torch.ones(2), a, g)])
def test_a_shifted_grid_is_refused(tails) -> None:
    with pytest.raises(ConfigError, match="expected a signed or an unsigned grid"):
        tails(1.0, Grid("shifted", 0.375))
