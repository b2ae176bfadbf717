"""Averages of weights over training."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from nipq.budget.freeze import freeze_bits_
from nipq.errors import ConfigError
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.ema import WeightAverage


def net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    prepare_(model, torch.zeros(1, 1, 4, 4))
    return calibrate_(model, [torch.randn(4, 1, 4, 4)])


def add_(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)
        model[1].running_mean.add_(amount)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_average_is_the_closed_form_for_parameters_and_norm_statistics() -> None:
    model = net()
    start = state(model)
    average = WeightAverage(model, 0.9)
    for _ in range(2):
        add_(model, 1.0)
        average.update(model)
    expected = 0.9 * 0.1 * 1 + 0.1 * 2  # of the 1 and 2 that were added
    average.copy_to_(model)
    moved = [name for name, _ in model.named_parameters()] + ["1.running_mean"]
    assert any("bit_raw" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(model.state_dict()[name], start[name] + expected)
    assert torch.equal(model.state_dict()["1.running_var"], start["1.running_var"])


def test_swapping_gives_the_models_own_values_back_even_after_an_error() -> None:
    model = net()
    start = state(model)
    average = WeightAverage(model, 0.5)
    add_(model, 1.0)
    own = state(model)

    def evaluate() -> None:
        with average.swapped(model):
            assert torch.equal(model.state_dict()["4.bias"], start["4.bias"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        evaluate()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_frozen_bits_leave_the_average() -> None:
    model = net()
    average = WeightAverage(model, 0.9)
    freeze_bits_(model)
    add_(model, 1.0)
    average.update(model)
    assert not any("bit_raw" in name for name in average.state_dict()["average"])
    with average.swapped(model):
        assert all(quantizer.is_frozen for quantizer in quantizers(model))


def test_half_precision_is_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(3):
        average.update(model)  # in bfloat16 1 + 0.001 is 1
    torch.testing.assert_close(average.state_dict()["average"]["weight"].item(), 2 - 0.999**3, rtol=1e-5, atol=0)
    average.copy_to_(model)
    assert model.weight.dtype == torch.bfloat16


def test_saving_and_loading_goes_on_exactly() -> None:
    model = net()
    average = WeightAverage(model, 0.9)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    add_(model, 1.0)
    other = WeightAverage(model, 0.1)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (average, other):
        each.update(model)
    left, right = average.state_dict()["average"], other.state_dict()["average"]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a decay from 0 to below 1, found 1"):
        WeightAverage(nn.Linear(1, 1), 1)
