from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config, Rule
from nipq.errors import OrderError
from nipq.prepare.layer_table import layer_table, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.report.summary import summary


class Tied(nn.Module):
    """10 x 10 weights used by two layers, and a head of 10 x 3; 11 weights do not fill whole bytes of a bit-plane."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 10)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    model = calibrate_(prepare_(Tied(), x), [x])
    set_bits_(model, {"first": 3, "second": {"activations": 6}, "head": {"weights": 8, "activations": 4}})
    return model


def test_totals_by_hand(model: nn.Module) -> None:
    found = summary(model)
    assert found.weight_bits == pytest.approx((100 * 3 + 30 * 8) / 130)  # the shared weight once
    assert found.activation_bits == pytest.approx((10 * 6 + 10 * 4) / 20)  # without the model's own input
    assert found.activation_bits_with_input == pytest.approx((10 * 8 + 10 * 6 + 10 * 4) / 30)
    assert found.weight_payload_bytes == 3 * 13 + 8 * 4
    assert found.bops == 100 * 3 * 8 + 100 * 3 * 6 + 30 * 8 * 4
    assert found.bops == sum(layer.bops for layer in found.layers)


def test_rows_hold_what_evaluation_uses(model: nn.Module) -> None:
    first, _, head = summary(model).layers
    row = layer_table(model)[0]
    assert (first.name, first.kind, first.is_input, first.frozen) == ("first", "Linear", True, True)
    assert (first.weight_bits, first.weight_bits_soft, first.activation_bits) == (3, 3.0, 8)
    assert first.weight_alpha == pytest.approx(row.weight.alpha.item())
    assert first.activation_alpha == pytest.approx(row.input.alpha.item())
    assert (first.grid, head.grid) == ("signed", "unsigned")
    assert (first.macs, first.weight_count, first.activation_count) == (100, 100, 10)


def test_learned_bits_show_soft_and_whole(x: Tensor) -> None:
    model = prepare_(Tied(), x, Config(weight_bits={"min": 2, "max": 8, "start": 3.3}))
    found = summary(model)
    assert found.layers[0].weight_bits == 3
    assert found.layers[0].weight_bits_soft == pytest.approx(3.3, abs=1e-5)
    assert not found.layers[0].frozen
    assert found.weight_bits == 3
    assert "3 (3.30)" in str(found)


def test_float_inputs_count_as_such(x: Tensor) -> None:
    rules = [Rule("second", quantize_input=False)]
    found = summary(prepare_(Tied(), x, Config(weight_bits=2, activation_bits=4, input_bits=None, rules=rules)))
    first, second, head = found.layers
    assert (first.activation_bits, second.activation_bits, second.grid) == (None, None, "float")
    assert [first.bops, second.bops, head.bops] == [100 * 2 * 8, 100 * 2 * 32, 30 * 2 * 4]  # an image has bytes
    assert found.bops == sum(layer.bops for layer in found.layers)
    assert found.activation_bits == found.activation_bits_with_input == 4
    assert "float" in str(found)


def test_without_quantized_inputs_there_is_no_average(x: Tensor) -> None:
    found = summary(prepare_(Tied(), x, Config(quantize_inputs=False)))
    assert found.activation_bits is found.activation_bits_with_input is None
    assert "all inputs float" in " ".join(str(found).split())
    only_image = summary(prepare_(nn.Sequential(nn.Linear(10, 2)), x))
    assert only_image.activation_bits is None
    assert only_image.activation_bits_with_input == 8


def test_it_prints_a_table_with_the_accounting_and_survives_json(model: nn.Module) -> None:
    found = summary(model)
    assert max(map(len, str(found).splitlines())) <= 80
    text = " ".join(str(found).split())
    assert "3 layers, first and last included; average bits: 4.154 over weights, 5.000 over inputs (6.000 with" in text
    assert all(layer.name in text for layer in found.layers)
    assert (found.parameters, found.coverage) == (100 + 10 + 10 + 30 + 3, 130 / 153)  # without those of quantizers
    assert "Budgets cover 85.0% of 153 parameters." in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["name"] == "first"


def test_a_float_model_has_no_summary() -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        summary(Tied())
