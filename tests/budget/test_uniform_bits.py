"""One bit-width for all tensors: the largest that keeps the budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nipq.budget.allocate import uniform_bits_
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize, costs
from nipq.config import Config, Rule
from nipq.errors import BudgetError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.train.models import digits_net


def prepared(config: Config | None = None) -> nn.Module:
    return prepare_(digits_net(width=4), torch.randn(1, 1, 8, 8), config or Config())


def widths(model: nn.Module) -> tuple[set[int], set[int]]:
    """Of weights, and of the inputs that are not the model's own."""
    rows = layer_table(model)
    inputs = {row.input.bits_rounded for row in rows if row.input is not None and not row.spec.is_input}
    return {row.weight.bits_rounded for row in rows}, inputs


@pytest.mark.parametrize(
    ("budget", "weights", "inputs"),
    [
        (AverageBits(weights=3, activations=3), 3, 3),
        (AverageBits(weights=3.9, activations=4), 3, 4),
        (AverageBits(weights=4, activations=2.5), 4, 2),
        (AverageBits(activations=5), 8, 5),
        (AverageBits(weights=100, activations=100), 8, 8),
    ],
)
def test_averages_are_met_on_each_side(budget: Budget, weights: int, inputs: int) -> None:
    model = prepared()
    uniform_bits_(model, budget)
    assert widths(model) == ({weights}, {inputs})


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", [ModelSize, BitOps])
def test_budget_is_kept_and_one_bit_more_would_break_it(kind: type[ModelSize | BitOps], share: float) -> None:
    model = prepared()
    low, high = (costs(_all_at(bits), kind(10**12))[0].rounded for bits in (2, 8))
    budget = kind(low + share * (high - low))
    uniform_bits_(model, budget)
    assert all(row.weight.is_frozen for row in layer_table(model))
    (weights,), (inputs,) = (tuple(found) for found in widths(model))
    assert costs(model, budget)[0].rounded <= costs(model, budget)[0].target
    assert costs(_all_at(weights + 1, inputs), budget)[0].rounded > costs(model, budget)[0].target


def _all_at(bits: int, inputs: int | None = None) -> nn.Module:
    return prepared(Config(weight_bits=bits, activation_bits=inputs or bits))


def test_fixed_bits_stay_and_narrower_ranges_are_kept() -> None:
    rules = [
        Rule("stem", weight_bits=8),
        Rule("classifier", weight_bits=(2, 3)),
        Rule("blocks.0.*", weight_bits={2, 6}),
    ]
    model = prepared(Config(rules=rules))
    uniform_bits_(model, AverageBits(activations=4) & ModelSize("1 MB"))
    bits = {row.name: row.weight.bits_rounded for row in layer_table(model)}
    assert (bits["stem"], bits["classifier"], bits["blocks.0.depthwise"], bits["blocks.1.depthwise"]) == (8, 3, 6, 8)


def test_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="average weight bits within 2 to 8"):
        uniform_bits_(prepared(), AverageBits(weights=1.5))
