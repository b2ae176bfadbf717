"""Bits from curvature: the closed form of a quadratic loss, brute force, and the budget."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits, BitOps
from nipq.budget.hawq import allocate_, sensitivities, squared_error
from nipq.config import Config, Rule
from nipq.errors import BudgetError, ConfigError, OrderError
from nipq.functional.clipping import noise_optimal_range
from nipq.functional.grid import SIGNED
from nipq.functional.uniform import quantize
from nipq.prepare.layer_table import layer_table, quantizers, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

FACTORS, SIZE = (1.0, 30.0, 0.02), 4
#: X^T X / N = I.
INPUTS = (
    2 * torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
)


class Branches(nn.Module):
    """Three linear layers side by side; the loss sums c_i times their squared outputs, so it is quadratic in each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(
            len(FACTORS) * SIZE, len(FACTORS) * SIZE, bias=False
        )  # so that the maps read no model input
        nn.init.eye_(self.first.weight)
        self.maps = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in FACTORS)
        for layer in self.maps:  # diagonal, so that the Hessian in the input is diagonal, too
            layer.weight.data = torch.diag(torch.randn(SIZE, generator=generator))

    def forward(self, x):
        return [layer(part) for layer, part in zip(self.maps, self.first(x).split(SIZE, dim=1), strict=True)]


def quadratic(outputs, _target):
    return sum(c * (out**2).sum(1).mean() for c, out in zip(FACTORS, outputs, strict=True))


def branches(**settings):
    """Inputs with X^T X / N = I in each branch."""
    model = Branches().double()
    x = INPUTS.repeat(1, len(FACTORS))
    prepare_(model, x[:1], Config(input_bits=None, rules=(Rule("first", weight_bits=8),), **settings))
    calibrate_(model, [x])
    return model, [(x, None)]


def test_traces_and_losses_are_those_of_the_closed_form() -> None:
    model, loader = branches()
    found = {one.name: one for one in sensitivities(model, loader, quadratic, probes=2)}
    assert len(found) == 6  # the first layer's bits are fixed
    for place, (factor, row) in enumerate(zip(FACTORS, layer_table(model)[1:], strict=True)):
        weight = row.layer.parametrizations.weight.original.detach()
        one = found[f"maps.{place}.weight"]
        assert one.trace.trace == pytest.approx(2 * factor * SIZE * SIZE, rel=1e-9)
        alpha = noise_optimal_range(weight, 3.0, SIGNED)
        squared = (quantize(weight, alpha, 3.0, SIGNED) - weight).square().sum()
        assert one.losses[3] == pytest.approx(one.trace.trace / weight.numel() * float(squared), rel=1e-6)
        assert list(one.losses) == [2, 3, 4, 5, 6, 7, 8]
        read = found[f"maps.{place}.input"]
        assert read.trace.trace == pytest.approx(2 * factor * float(weight.square().sum()), rel=1e-9)
        assert read.trace.count == SIZE


def test_predicted_loss_is_the_loss_that_rounding_adds() -> None:
    """At the minimum of a quadratic loss with an isotropic Hessian, tr H ||e||^2 / (2 N) is exact."""
    model, loader = branches()
    row, layer = layer_table(model)[2], model.maps[1]
    found = {one.name: one for one in sensitivities(model, loader, quadratic, probes=2)}[row.weight.name]
    weight = layer.parametrizations.weight.original.detach()
    for bits in (2, 4):
        error = quantize(weight, noise_optimal_range(weight, float(bits), SIGNED), float(bits), SIGNED) - weight
        added = FACTORS[1] * (loader[0][0][:, SIZE : 2 * SIZE] @ error.T).square().sum(1).mean()
        assert found.losses[bits] / 2 == pytest.approx(float(added), rel=1e-9)


@pytest.mark.parametrize("budget", [AverageBits(7.1, 4.1), AverageBits(6.8) & BitOps("37.8 k"), BitOps("37.6 k")])
def test_no_assignment_within_the_budget_loses_less(budget) -> None:
    model, loader = branches(weight_bits={2, 3, 5, 8}, activation_bits={2, 4, 6})
    found = sensitivities(model, loader, quadratic, probes=2)
    (*limits,) = budget.limits(model)
    frozen = allocate_(model, loader, quadratic, budget, probes=2)

    def loss(bits) -> float:
        return sum(one.losses[b] for one, b in zip(found, bits, strict=True))

    def kept(bits) -> bool:
        return all(limit.allows(limit.exact_cost((8, *bits[:3]), bits[3:])) for limit in limits)

    chosen = tuple(frozen.bits[one.name] for one in found)
    best = min((bits for bits in product(*(one.losses for one in found)) if kept(bits)), key=loss)
    assert kept(chosen)
    assert loss(chosen) <= loss(best) * 1.003
    assert all(cost.rounded <= cost.target for cost in frozen.costs)


def test_bits_follow_the_layer_that_the_loss_depends_on_most() -> None:
    model, loader = branches()
    bits = allocate_(model, loader, quadratic, AverageBits(7, 4), probes=2).bits
    assert bits["maps.1.weight"] > bits["maps.0.weight"] >= bits["maps.2.weight"]
    assert bits["maps.1.input"] > bits["maps.0.input"] >= bits["maps.2.input"]


def net(**settings) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(1)
    conv = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.Hardswish()]
    model = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    images, labels = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    prepare_(model, images[:1], Config(**settings))
    calibrate_(model, [images])
    return model, [(images[:8], labels[:8]), (images[8:], labels[8:])]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_nothing_but_bits_changes_and_the_budget_holds(granularity) -> None:
    model, loader = net(granularity=granularity, rules=(Rule("0", weight_bits=8),))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "bit" not in name}
    budget = AverageBits(3.6, 3.2) & BitOps("230 k")
    frozen = allocate_(model, loader, cross_entropy, budget, probes=4)
    assert all(cost.rounded <= cost.target for cost in frozen.costs)
    assert frozen.bits["0.weight"] == 8
    assert frozen.bits["0.input"] == 8
    assert all(q.is_frozen and q.bits_rounded == frozen.bits[q.name] for q in quantizers(model))
    after = model.state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before.keys() - same if not name.endswith("_extra_state")} == set()
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    calibrate_(model, [images for images, _ in loader])
    set_phase_(model, "round")
    model(loader[0][0])


def test_samples_are_whole_batches_and_the_seed_decides() -> None:
    model, loader = net()
    few, all_, again = (sensitivities(model, loader, cross_entropy, samples=n, probes=2)[0].trace for n in (8, 24, 24))
    assert all_ == again
    assert few != all_
    assert few == sensitivities(model, loader[:1], cross_entropy, probes=2)[0].trace


def test_what_no_limit_counts_gets_its_most_bits() -> None:
    model, loader = net()
    found = allocate_(model, loader, cross_entropy, AverageBits(weights=3), probes=4)
    assert {bits for name, bits in found.bits.items() if name.endswith("input")} == {8}


def test_a_trace_below_its_error_counts_as_the_error() -> None:
    model, loader = net()
    found = sensitivities(model, loader, lambda out, y: -cross_entropy(out, y), probes=3)
    negative = [one for one in found if one.trace.trace < 0]
    assert negative
    for one in negative:
        assert one.losses[4] == pytest.approx(one.trace.error * one.errors[4])


def test_the_error_falls_with_bits_and_is_the_mean_over_channels() -> None:
    model, _ = net(granularity="channel")
    row = layer_table(model)[1]
    weight = row.layer.parametrizations.weight.original.detach()
    errors = [squared_error(row.weight, weight, bits) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    tensor = net()[0]
    single = [squared_error(layer_table(tensor)[1].weight, channel, 3) for channel in weight]
    assert errors[1] == pytest.approx(sum(single) / len(single), rel=1e-5)


def test_calls_in_the_wrong_order_are_refused() -> None:
    model = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), Config(input_bits=5))
    loader = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(OrderError, match=r"0\.input: expected a calibrated model"):
        allocate_(model, loader, cross_entropy, AverageBits(weights=4))
    with pytest.raises(OrderError, match="expected a prepared model"):
        allocate_(nn.Linear(2, 2), loader, cross_entropy, AverageBits(weights=4))
    calibrate_(model, [loader[0][0]])
    with pytest.raises(BudgetError, match="within 2 to 8 bit"):
        allocate_(model, loader, cross_entropy, AverageBits(weights=1))
    with pytest.raises(ConfigError, match="2 probes or more, found 1"):
        allocate_(model, loader, cross_entropy, AverageBits(weights=4), probes=1)
    with pytest.raises(ConfigError, match="at least one batch"):
        allocate_(model, [], cross_entropy, AverageBits(weights=4))
    assert not quantizers(model)[0].is_frozen


def test_a_layer_that_the_batches_never_reach_is_named() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)) if float(x.sum()) >= 0 else self.a(x)

    model = prepare_(Sometimes(), torch.ones(1, 2))
    calibrate_(model, [torch.ones(4, 2)])
    with pytest.raises(OrderError, match=r"b\.input: expected the batches to reach it"):
        sensitivities(model, [(-torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))], cross_entropy, probes=2)


def test_a_sensitivity_is_plain_data() -> None:
    model, loader = branches()
    found = sensitivities(model, loader, quadratic, probes=2)[0].to_dict()
    assert found["name"] == "maps.0.weight"
    assert found["trace"]["count"] == 16
