"""The snap never exceeds a limit, and among whole bit-widths it finds the best."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nipq.budget import solver as bit_programme
from nipq.budget.bit_table import Limit
from nipq.budget.budget import AverageBits, BitOps, ModelSize, costs
from nipq.budget.freeze import assign, freeze_bits_
from nipq.config import Config, Rule
from nipq.errors import BudgetError, NonFiniteError, OrderError
from nipq.functional.cost import CostForm
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_


def limit(weight, activation, product_, target, owner, denominator=1) -> Limit:
    parts = [torch.tensor(part, dtype=torch.float64) / denominator for part in (weight, activation, product_)]
    form = CostForm(0.0, *parts, torch.tensor(owner, dtype=torch.int64))
    return Limit("cost", "bit", target, "bound", form, denominator, "")


@st.composite
def problems(draw):
    """Two or three weights, as many layers, small choices, and limits of every kind that the fewest bits keep."""
    weights, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    owner = [draw(st.integers(0, weights - 1)) for _ in range(layers)]
    allowed = st.sampled_from([(2, 3, 4), (2, 4, 8), (3,), (2, 8), (4, 5)])
    choices = [draw(allowed) for _ in range(weights + layers)]
    soft = np.array([draw(st.floats(c[0], c[-1])) for c in choices])
    limits = []
    for _ in range(draw(st.integers(1, 2))):
        counts = [[draw(st.integers(0, 10**6)) for _ in range(n)] for n in (weights, layers, layers)]
        denominator = draw(st.sampled_from([1, 7, 1000]))
        trial = limit(*counts, 1.0, owner, denominator)
        fewest, most = (
            trial.exact_cost([c[end] for c in choices[:weights]], [c[end] for c in choices[weights:]])
            for end in (0, -1)
        )
        target = float(fewest + (most - fewest) * draw(st.fractions(0, 1)))
        target = max(target, float(np.nextafter(float(fewest), np.inf)), 1e-3)
        limits.append(limit(*counts, target, owner, denominator))
    return choices, soft, limits


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_limit_is_exceeded_and_no_assignment_is_better(problem) -> None:
    choices, soft, limits = problem
    price = bit_programme.prices(limits, soft)

    def noise(bits) -> float:
        return sum(p * 4.0 ** (s - b) if p > 0 else abs(s - b) for p, s, b in zip(price, soft, bits, strict=True))

    found = assign(choices, soft, limits)
    assert all(b in allowed for b, allowed in zip(found, choices, strict=True))
    assert all(bit_programme._allowed(one, found) for one in limits)
    best = min(noise(bits) for bits in product(*choices) if all(bit_programme._allowed(one, bits) for one in limits))
    assert noise(found) <= best * (1 + 2 * bit_programme.GAP) + 1e-9


def test_at_equal_prices_the_learned_order_decides() -> None:
    one = limit([100, 100], [], [], 800.0, [])
    assert assign([(2, 3, 4, 5, 6)] * 2, np.array([5.2, 2.8]), [one]) == [5, 3]


def test_an_answer_above_the_limit_is_lowered_where_it_adds_least_noise() -> None:
    choices = [(2, 3, 4), (2, 3, 4), (2, 3, 4)]
    noise = [np.array([9.0, 5.0, 1.0]), np.array([2.0, 1.5, 1.0]), np.array([1.1, 1.0, 0.0])]
    one = limit([10, 10, 0], [], [], 79.0, [])
    assert bit_programme._lower([4, 4, 3], choices, noise, [one]) == [
        4,
        3,
        3,
    ]  # the third costs nothing


def test_a_limit_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(BudgetError, match="cost of at least 200 bit, the cost of the fewest bits; found 199"):
        assign([(2, 3)], np.array([2.5]), [limit([100], [], [], 199.0, [])])


def net(config: Config | None = None) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    return prepare_(nn.Sequential(*layers), torch.zeros(1, 1, 6, 6), config or Config())


def spread_(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            nn.init.normal_(quantizer.bit_raw, std=1.5)
    return model


@pytest.mark.parametrize("mode", ["bound", "target"])
def test_a_frozen_model_keeps_every_limit_and_comes_near_it(mode) -> None:
    model = spread_(net())
    budget = AverageBits(4.3, 3.7, mode) & BitOps("40 k", mode) & ModelSize("1.6 kB", mode)
    found = freeze_bits_(model, budget)
    assert [c.rounded for c in found.costs] == [c.rounded for c in costs(model, budget)]
    assert all(c.soft == c.rounded <= c.target for c in found.costs)
    assert max(c.rounded / c.target for c in found.costs) > 0.97
    assert all(q.is_frozen and q.bits_rounded == found.bits[q.name] for q in quantizers(model))
    assert not any("bit_raw" in name for name, _ in model.named_parameters())


def test_fixed_bits_and_allowed_sets_are_honoured() -> None:
    model = spread_(net(Config(weight_bits={2, 4, 8}, rules=(Rule("5", weight_bits=7),))))
    found = freeze_bits_(model, AverageBits(weights=5)).bits
    assert found["5.weight"] == 7
    assert {found["0.weight"], found["2.weight"]} <= {2, 4, 8}


def test_what_no_limit_prices_and_what_has_no_budget_is_rounded_to_the_nearest() -> None:
    torch.manual_seed(5)
    model = spread_(net())
    nearest = {q.name: q.bits_rounded for q in quantizers(model)}
    torch.manual_seed(5)
    other = spread_(net())
    found = freeze_bits_(model, AverageBits(weights=3)).bits
    assert {n: b for n, b in found.items() if n.endswith("input")} == {
        n: b for n, b in nearest.items() if n.endswith("input")
    }
    assert freeze_bits_(other).bits == nearest


def test_a_shared_weight_is_frozen_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepare_(model, torch.zeros(1, 4))
    found = freeze_bits_(model, AverageBits(weights=4.9) & BitOps(16 * 4 * 8 + 16 * 4 * 6))
    assert found.bits["0.weight"] * (8 + found.bits["2.input"]) <= 56
    assert len(found.bits) == 3


def test_freezing_twice_changes_nothing_and_still_checks() -> None:
    model = spread_(net())
    first = freeze_bits_(model, AverageBits(weights=4))
    assert freeze_bits_(model, AverageBits(weights=4)).bits == first.bits
    with pytest.raises(BudgetError, match="average weight bits within"):
        freeze_bits_(model, AverageBits(weights=2))


def test_impossible_budgets_and_bits_that_are_not_finite_change_nothing() -> None:
    model = net()
    with pytest.raises(BudgetError, match="within 2 to 8 bit"):
        freeze_bits_(model, AverageBits(weights=1))
    nn.init.constant_(quantizers(model)[0].bit_raw, float("nan"))
    with pytest.raises(NonFiniteError, match=r"0\.weight: expected a finite bit-width"):
        freeze_bits_(model, AverageBits(weights=4))
    assert not quantizers(model)[0].is_frozen


def test_threads_may_freeze_at_once_and_leave_standard_output_alone(capfd) -> None:
    models = [spread_(net()) for _ in range(4)]
    alone = [freeze_bits_(copy.deepcopy(model), AverageBits(weights=4)).bits for model in models]
    before = os.fstat(1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: freeze_bits_(model, AverageBits(weights=4)).bits, models))
    assert found == alone
    assert os.path.samestat(os.fstat(1), before)
    print("spoken")
    assert capfd.readouterr().out == "spoken\n"


def test_the_assignment_prints_and_is_plain_data() -> None:
    found = freeze_bits_(spread_(net()), AverageBits(weights=4))
    assert str(found).splitlines()[0].startswith("0.weight")
    assert found.to_dict()["costs"][0]["unit"] == "bit"


def test_a_second_freeze_within_another_budget_is_refused() -> None:
    model = net()
    budget = AverageBits(weights=4, activations=4)
    first = freeze_bits_(model, budget)
    assert freeze_bits_(model, budget).bits == freeze_bits_(model).bits == first.bits
    with pytest.raises(OrderError, match=r"found them frozen within average weight bits 4, average act"):
        freeze_bits_(copy.deepcopy(model), AverageBits(weights=6, activations=6))


def test_weights_of_nan_are_not_frozen() -> None:
    model = net()
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("weight.original"))
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"^freeze_bits_: {name.split('.')[0]}\.weight: expected finite numbers"):
        freeze_bits_(model, AverageBits(weights=4))
