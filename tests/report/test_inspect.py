from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nipq.budget.budget import AverageBits, BitOps, ModelSize, costs
from nipq.config import Config, Rule
from nipq.errors import ConfigError, NotQuantizableError
from nipq.export.api import export
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.report.inspect import inspect


class Net(nn.Module):
    """A convolution with batch norm, a residual add, tied linear layers and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.conv(x))
        return self.second(nn.functional.gelu(self.first(x.mean(dim=(2, 3)))))


X = torch.zeros(1, 3, 4, 4)


def test_layers_totals_and_findings() -> None:
    found = inspect(Net(), X)
    assert [layer.spec.name for layer in found.layers] == ["conv", "first", "second"]
    assert [layer.shares_weight_with for layer in found.layers] == [None, None, "first"]
    assert (found.weights, found.macs) == (81 + 9, 81 * 16 + 9 + 9)
    assert found.parameters == 81 + 9 + 3 + 3 + 3 + 3
    assert found.float_bytes == 4 * (found.parameters + 6) + 8  # running statistics, and an int64 counter
    assert found.layers[0].spec.batchnorm == "norm"
    assert found.layers[0].input_bits == (8,)
    assert found.layers[1].input_bits == found.layers[1].weight_bits == tuple(range(2, 9))
    reasons = [finding.reason for finding in found.findings]
    assert [reason.split(":")[0] for reason in reasons[:3]] == ["add", "mean", "gelu"]


def test_the_model_is_not_changed() -> None:
    model = Net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inspect(model, X)
    assert model.training
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_uniform_columns_are_what_the_prepared_model_costs(bits: int) -> None:
    model = prepare_(Net(), X)
    set_bits_(model, bits)
    budget = AverageBits(weights=1, activations=1) & ModelSize(1) & BitOps(1)
    expected = {cost.name: cost.rounded for cost in costs(model, budget)}
    found = {found.name: found.uniform[bits] for found in inspect(Net(), X).ranges}
    assert list(found) == ["average weight bits", "average activation bits", "model size", "bit-operations"]
    assert found == pytest.approx(expected)


def test_ranges_keep_what_is_fixed_and_what_is_allowed() -> None:
    rules = [Rule("conv", weight_bits=8), Rule("first", weight_bits={2, 4, 8}), Rule("second", weight_bits={2, 4, 8})]
    weights, activations, size, operations = inspect(Net(), X, Config(rules=rules, activation_bits=5)).ranges
    assert (weights.low, weights.high) == (pytest.approx((81 * 8 + 9 * 2) / 90), 8)
    assert weights.uniform[6] == pytest.approx((81 * 8 + 9 * 4) / 90)  # of 4 and 8, the lower
    assert activations.low == activations.high == 5
    assert size.low < size.uniform[4] < size.high
    assert operations.high == 81 * 16 * 8 * 8 + 2 * 9 * 8 * 5
    assert "whole file" in size.accounting


class Experts(nn.Module):
    """A linear layer beside a larger stack of matrices that is no module's weight, as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.stacked = nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(7, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", self.router(x), self.stacked)


def test_the_share_of_the_weights_that_budgets_cover_is_said() -> None:
    found = inspect(Experts(), torch.randn(2, 4))
    assert found.coverage == 16 / (16 + 112) == found.to_dict()["coverage"]
    assert found.largest_float == {"stacked": 112}
    text = " ".join(str(found).split())
    assert "Budgets cover these weights: 12.5% of the float model's 128 parameters" in text
    assert "The largest that stay float: stacked (112)." in text


def test_weights_only_has_no_activation_average() -> None:
    found = inspect(Net(), X, Config(quantize_inputs=False))
    assert [entry.name for entry in found.ranges] == ["average weight bits", "model size", "bit-operations"]
    assert found.layers[1].input_bits == ()


def test_it_prints_tables_policy_and_survives_json() -> None:
    rules = [Rule("first", granularity="channel"), Rule("second", granularity="channel")]
    found = inspect(Net(), X, Config(rules=rules))
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(str(found).split())
    assert "3 layers to quantize: 90 weights" in text
    assert "Budgets cover these weights: 88.2% of the float model's 102 parameters" in text
    assert "The largest that stay float: conv.weight" not in text
    assert "second = first" in text
    assert "2..8 x3" in text
    assert "8 (image)" in text
    assert "add: sums of activations" in text
    assert "First and last layer count in every average and cost (conv: weight 2..8, input 8; second: weight" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][2]["shares_weight_with"] == "first"


def test_allowed_sets_are_spelt_out() -> None:
    text = " ".join(str(inspect(Net(), X, Config(weight_bits={2, 4, 8}, activation_bits=4))).split())
    assert "conv: weight 2,4,8, input 8; second: weight 2,4,8, input 4" in text


def test_a_model_that_would_be_refused_says_why() -> None:
    found = inspect(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), torch.zeros(1, 4))
    assert found.layers == found.ranges == ()
    assert found.findings[0].severity == "error"
    assert "weight norm" in str(found)
    assert found.coverage == 0
    assert "Nothing would be quantized" in str(found)


def test_mistakes_are_errors() -> None:
    with pytest.raises(ConfigError, match="Rule 'nothing'"):
        inspect(Net(), X, Config(rules=[Rule("nothing", weight_bits=4)]))
    with pytest.raises(NotQuantizableError, match="expected a forward that accepts the example inputs"):
        inspect(Net(), torch.zeros(1, 2))


class TwoInputs(nn.Module):
    """Called with two tensors by position."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.left(x)) + self.right(y)


@pytest.mark.parametrize(
    ("build", "example", "config", "bits"),
    [
        (Net, torch.randn(2, 3, 4, 4), Config(weight_bits={3, 8}, activation_bits={3, 8}), (3, 8)),
        (TwoInputs, (torch.randn(2, 3), torch.randn(2, 4)), Config(weight_bits=4, activation_bits=4), (4,)),
    ],
)
def test_onnx_files_are_promised_to_the_byte_before_anything_is_done(
    tmp_path: Path, build: type[nn.Module], example: ExampleInputs, config: Config, bits: tuple[int, ...]
) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network = build()
    promised = {found.name: found.uniform for found in inspect(network, example, config, onnx=True).ranges}
    for width, pack in itertools.product(bits, (False, True)):
        model = prepare_(copy.deepcopy(network), example, config)
        inputs = example if isinstance(example, Tensor) else {"x": example[0], "y": example[1]}
        calibrate_(model, [inputs])
        set_bits_(model, width)
        with torch.no_grad():  # training moves every number
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        path = tmp_path / f"{width}{pack}.onnx"
        export(convert(model), path, inputs, pack=pack)
        assert path.stat().st_size == promised["ONNX file, packed" if pack else "ONNX file"][width]


def test_onnx_files_are_promised_on_demand_only() -> None:
    assert not [found for found in inspect(Net(), X).ranges if found.name.startswith("ONNX")]


def test_levels_of_weights_are_named_where_they_are_not_symmetric() -> None:
    rules = [Rule("conv", weight_levels="full"), Rule("first", weight_bits=8), Rule("second", weight_bits=8)]
    found = inspect(Net(), X, Config(weight_levels="balanced", rules=rules))
    assert [layer.weight_grid for layer in found.layers] == ["full", "signed", "signed"]
    text = " ".join(str(found).split())
    assert "2..8 full" in text
    assert "signed" not in text
