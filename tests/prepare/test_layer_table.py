from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.errors import NonFiniteError, OrderError
from nipq.prepare.layer_table import check_finite, layer_table, quantizers
from nipq.prepare.prepare import prepare_


class Backwards(nn.Module):
    """Its layers run in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.first = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def model() -> nn.Module:
    return prepare_(Backwards(), torch.randn(2, 4))


def test_rows_come_in_the_order_of_execution(model: nn.Module) -> None:
    first, last = layer_table(model)
    assert (first.name, last.name) == ("first", "last")
    assert first.layer is model.first
    assert first.weight is model.first.parametrizations.weight[0]
    assert first.input is model.first.quantization.input
    assert first.spec.weight_count == 16
    assert quantizers(model) == [first.weight, first.input, last.weight, last.input]


def test_the_batch_norm_is_the_one_in_the_model_now(model: nn.Module) -> None:
    assert layer_table(model)[0].batchnorm is model.norm
    assert layer_table(model)[1].batchnorm is None
    model.norm = nn.BatchNorm1d(4)
    assert layer_table(model)[0].batchnorm is model.norm


def test_wrappers_and_parts_find_the_same_rows(model: nn.Module) -> None:
    norm = model.norm
    wrapped = nn.ModuleDict({"module": model})
    assert [row.name for row in layer_table(wrapped)] == ["first", "last"]
    assert layer_table(wrapped)[0].batchnorm is norm
    outer = prepare_(nn.Sequential(nn.Identity(), Backwards()), torch.randn(2, 4))
    assert [row.name for row in layer_table(outer[1])] == ["1.first", "1.last"]
    assert layer_table(outer[1])[0].batchnorm is outer[1].norm
    assert layer_table(outer[1].first)[0].batchnorm is None  # out of sight


def test_a_float_model_has_no_table() -> None:
    for call in (layer_table, quantizers):
        with pytest.raises(OrderError, match=r"Linear: expected a prepared model, found no quantizer\. Call nipq"):
            call(nn.Linear(2, 2))


def test_a_range_that_training_drove_to_0_has_a_message_of_its_own() -> None:
    x = torch.randn(5, 4)
    model = nipq.calibrate_(nipq.prepare_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), x), [x])
    check_finite(model)
    with torch.no_grad():
        layer_table(model)[1].weight.alpha_raw[0] = -80
    with pytest.raises(NonFiniteError, match=r"2\.parametrizations\.weight\.0\.alpha: .* driven to 0"):
        nipq.freeze_bits_(model)
