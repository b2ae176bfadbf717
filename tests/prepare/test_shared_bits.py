"""``Config(shared_bits=...)``: one bit-width for layers that read the same tensor, learned, rounded and frozen once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.budget.allocate import allocate_bits_
from nipq.budget.bit_table import BitTable
from nipq.budget.budget import AverageBits, BitOps, ModelSize
from nipq.config import Config, Rule
from nipq.errors import ConfigError
from nipq.prepare.layer_table import layer_table, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_
from nipq.qat.search import Search

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
QKV = ("*.query", "*.key", "*.value")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.gate = (nn.Linear(8, 8 * (i + 1)) for i in range(4))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.key(x)[..., :8] * self.value(x)[..., :8] + self.gate(x)[..., :8]
        return self.out(torch.relu(self.query(x) + wide))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Block(), Block())


def prepared(**settings: object) -> nn.Module:
    return calibrate_(prepare_(net(), X, Config(**({"shared_bits": QKV} | settings))), [X])


def bits_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {row.name: (row.weight.bits_rounded, row.input.bits_rounded) for row in layer_table(model)}


def test_each_block_has_groups_of_its_own() -> None:
    model = prepared()
    table = BitTable(layer_table(model))
    members = [tuple(member.name for member in group) for group in table.members if len(group) > 1]
    for part in ("weight", "input"):
        for block in ("1", "2"):
            assert tuple(f"{block}.{name}.{part}" for name in ("key", "value", "query")) in members
    assert len(members) == 4
    assert len(table.quantizers) == len(table.choices) == 22 - 8
    notes = [(f.name, f.reason) for f in validate(net(), X, Config(shared_bits=QKV)) if f.severity == "note"]
    assert notes == [(f"{i}.key", f"it shares its bit-widths with {i}.value, {i}.query") for i in (1, 2)]


def test_costs_are_those_of_separate_bits() -> None:
    budget = AverageBits(weights=4, activations=4) & ModelSize("5 kB") & BitOps("1 G")
    shared, apart = prepared(), prepared(shared_bits=())
    for model in (shared, apart):
        set_bits_(model, {"1.*": {"weights": 3, "activations": 5}, "2.*": {"weights": 6, "activations": 7}, "0": 2})
    assert bits_of(shared) == bits_of(apart)
    found = [[cost.rounded for cost in nipq.costs(model, budget)] for model in (shared, apart)]
    assert found[0] == pytest.approx(found[1])
    assert nipq.summary(shared).to_dict() == nipq.summary(apart).to_dict()


def test_one_parameter_gets_the_gradients_of_all() -> None:
    model = prepared(stochastic_bits=False)
    keys, values = (model.get_submodule(f"1.{name}").parametrizations.weight[0] for name in ("key", "value"))
    assert keys.bit_raw is values.bit_raw
    names = [name for name, _ in model.named_parameters() if name.endswith("bit_raw")]
    assert len(names) == 21 - 8  # the model's own input has fixed bits
    (model.train()(X).square().mean() + Search(model, AverageBits(weights=4), 2).penalty()).backward()
    assert keys.bit_raw.grad.abs() > 0
    groups = nipq.param_groups(model, lr=0.1)
    assert len(groups[-1]["params"]) == len(names)
    torch.optim.SGD(groups).step()
    assert torch.equal(keys.bits, values.bits)


def test_freezing_decides_once_for_a_group_and_keeps_the_budget() -> None:
    model = prepared()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape == (1,):
                parameter.add_(torch.randn(1) * 0.3)
    budget = AverageBits(weights=3.3, activations=4.1)
    nipq.freeze_bits_(model, budget)
    table = BitTable(layer_table(model))
    whole, count = [choices[0] for choices in table.choices], len(table.weights)
    assert all(limit.allows(limit.exact_cost(whole[:count], whole[count:])) for limit in budget.limits(model))
    for block in "12":
        assert len({bits_of(model)[f"{block}.{name}"] for name in ("key", "value", "query")}) == 1
    deployed = nipq.convert(model)
    assert nipq.verify(model, deployed, [X])


class Crossed(nn.Module):
    """Two groups, of which one weight is in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x) + self.c(x))
        return self.d(y) + self.b(y)


def test_groups_with_a_weight_in_common_become_one() -> None:
    model = calibrate_(prepare_(Crossed(), X, Config(shared_bits=("?",))), [X])
    table = BitTable(layer_table(model))
    groups = [sorted(member.name for member in group) for group in table.members]
    assert groups == [["a.weight", "c.weight", "d.weight"], ["a.input", "c.input"], ["b.input", "d.input"]]
    a, d = (model.get_submodule(name).parametrizations.weight[0] for name in "ad")
    assert a.bit_raw is d.bit_raw
    Search(model, AverageBits(weights=4), 2).penalty().backward()
    assert len([name for name, _ in model.named_parameters() if name.endswith("weight.0.bit_raw")]) == 1
    set_bits_(model, {"c": {"weights": 3}})
    assert {row.weight.bits_rounded for row in layer_table(model)} == {3}


def test_bits_fixed_for_one_are_fixed_for_all_and_states_and_copies_keep_the_group() -> None:
    model = prepared()
    copied = copy.deepcopy(model)
    set_bits_(model, {"1.key": {"weights": 3}})
    assert [bits_of(model)[f"1.{name}"][0] for name in ("query", "key", "value", "gate")] == [3, 3, 3, 5]
    assert bits_of(copied)["1.key"][0] == 5
    fresh = prepared()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert bits_of(fresh) == bits_of(model)
    set_bits_(copied, {"2.value": {"activations": 7}})
    assert bits_of(copied)["2.query"][1] == 7


def test_the_start_at_the_budget_measures_the_whole_group() -> None:
    model = prepared()
    budget = AverageBits(weights=4, activations=4)
    losses = allocate_bits_(model, [(X, X)], budget, nn.functional.mse_loss, batches=1)
    assert {"1.key.weight", "1.value.weight", "1.query.weight"} < losses.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shared_bits": ("*.nothing",)},
            r"shared_bits '\*\.nothing': expected it to match a layer that reads the same",
        ),
        ({"shared_bits": ("*.query",)}, r"shared_bits '\*\.query': expected it to match a layer that reads the same"),
        ({"rules": [Rule("1.value", weight_bits=4)]}, r"1\.value: expected the bit-widths of 1\.key"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(**settings)
