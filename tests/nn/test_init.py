from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

import nipq
from nipq.config import BitRange, Config
from nipq.errors import NonFiniteError
from nipq.functional.clipping import noise_optimal_range
from nipq.functional.grid import SIGNED, Grid
from nipq.nn.init import SHIFTS, start_input_range_, start_weight_range_
from nipq.nn.quantizer import InputQuantizer, WeightQuantizer


def input_quantizer(**settings: object) -> InputQuantizer:
    return InputQuantizer("layer.input", BitRange(fixed=4), **settings)


# ---------------------------------------------------------------------- weights


def test_weight_boundary_minimises_the_error_at_the_bits_of_the_moment() -> None:
    weight = torch.randn(500)
    quantizer = WeightQuantizer("w", BitRange())
    start_weight_range_(quantizer, weight)
    at_five = quantizer.alpha.clone()
    torch.testing.assert_close(at_five, noise_optimal_range(weight, 5.0, SIGNED))
    quantizer.freeze_bits_(2)
    start_weight_range_(quantizer, weight)
    assert quantizer.alpha.item() < at_five.item()


def test_weight_boundary_max_is_the_largest_magnitude() -> None:
    quantizer = WeightQuantizer("w", BitRange(), init="max")
    start_weight_range_(quantizer, torch.tensor([0.5, -3.0]))
    assert quantizer.alpha.item() == pytest.approx(3.0)


def test_weight_boundary_release_leaves_softplus_in() -> None:
    quantizer = WeightQuantizer("w", BitRange(), init="release")
    start_weight_range_(quantizer, torch.tensor([0.5, -3.0]))
    assert quantizer.alpha_raw.item() == 0.5
    assert quantizer.alpha.item() == pytest.approx(functional.softplus(torch.tensor(0.5)).item())
    assert quantizer.calibrated


def test_weight_boundaries_per_channel() -> None:
    weight = torch.randn(3, 40) * torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1)
    quantizer = WeightQuantizer("w", BitRange(fixed=4), channels=3)
    start_weight_range_(quantizer, weight)
    expected = torch.cat([noise_optimal_range(row, 4.0, SIGNED) for row in weight])
    torch.testing.assert_close(quantizer.alpha, expected)


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("function", "kind", "shift"),
    [
        (torch.relu, "unsigned", 0.0),
        (functional.hardswish, "shifted", SHIFTS["hardswish"]),
        (functional.silu, "shifted", SHIFTS["silu"]),
        (functional.gelu, "shifted", SHIFTS["gelu"]),
        (torch.tanh, "signed", 0.0),
    ],
)
def test_the_grid_follows_the_activation_function(function, kind: str, shift: float) -> None:
    quantizer = input_quantizer()
    start_input_range_(quantizer, function(2 * torch.randn(20_000)))
    assert quantizer.grid == Grid(kind, shift)
    assert quantizer.calibrated


@pytest.mark.parametrize("function", [functional.hardswish, functional.silu, functional.gelu])
def test_no_activation_function_dips_below_its_shift(function) -> None:
    x = torch.linspace(-20, 20, 2_000_001, dtype=torch.float64)
    lowest, shift = -float(function(x).min()), SHIFTS[function.__name__]
    assert lowest <= shift + 1e-9
    assert shift < lowest * 1.001


@pytest.mark.parametrize("choice", ["signed", "unsigned", "shifted"])
def test_a_rule_overrides_the_choice_of_grid(choice: str) -> None:
    quantizer = input_quantizer(grid_choice=choice)
    start_input_range_(quantizer, functional.hardswish(torch.randn(1000)))
    assert quantizer.grid.kind == choice


def test_a_shift_that_no_known_function_covers_is_taken_from_the_sample() -> None:
    quantizer = input_quantizer(grid_choice="shifted")
    start_input_range_(quantizer, torch.tensor([-1.5, 0.0, 4.0]))
    assert quantizer.grid == Grid("shifted", 1.5)


def test_input_boundary_max_covers_the_sample() -> None:
    quantizer = input_quantizer(init="max")
    start_input_range_(quantizer, torch.tensor([0.0, 1.0, 7.0]))
    assert quantizer.alpha.item() == pytest.approx(7.0)


@pytest.mark.parametrize(("sample", "raw"), [([0.0, 1.0], 6.0), ([-1.0, 1.0], 3.0)])
def test_input_boundary_release_is_the_published_constant(sample: list[float], raw: float) -> None:
    quantizer = input_quantizer(init="release")
    start_input_range_(quantizer, torch.tensor(sample))
    assert quantizer.alpha_raw.item() == raw
    assert quantizer.calibrated


def test_an_input_that_is_always_zero_gets_some_boundary() -> None:
    quantizer = input_quantizer()
    start_input_range_(quantizer, torch.zeros(10))
    assert quantizer.alpha.item() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_name(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"layer\.input: expected finite activations while calibrating"):
        start_input_range_(input_quantizer(), torch.tensor([0.0, value]))


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-42])
@pytest.mark.parametrize("init", ["mse", "max", "lsq"])
def test_data_of_no_extent_get_a_range_of_1_and_a_message(
    init: Literal["mse", "max", "lsq"], size: float, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.full((4, 3), size)
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.constant_(model[0].weight, size)
    nipq.prepare_(model, torch.ones(4, 3), Config(init=init, input_bits=None))
    assert "0.weight: every weight is 0" in caplog.text
    weight = model[0].parametrizations.weight[0]  # type: ignore[union-attr, index]
    torch.testing.assert_close(weight.alpha.detach(), torch.ones_like(weight.alpha))
    own = InputQuantizer("dead.input", BitRange(), init=init)
    start_input_range_(own, x)
    torch.testing.assert_close(own.alpha.detach(), torch.ones(1))
    assert "dead.input: every calibration sample is 0" in caplog.text
