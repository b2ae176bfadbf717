from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config, Phase, Rule
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import layer_table, phase_of, quantizers, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 2, 5)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    return calibrate_(prepare_(net(), x), [x]).eval()


def bits(model: nn.Module) -> dict[str, tuple[int, int | None]]:
    rows = layer_table(model)
    return {row.name: (row.weight.bits_rounded, row.input.bits_rounded if row.input else None) for row in rows}


# ---------------------------------------------------------------------- phases


@pytest.mark.parametrize("phase", list(Phase))
def test_every_quantizer_takes_the_phase(model: nn.Module, phase: Phase) -> None:
    set_phase_(model, phase)
    for quantizer in quantizers(model):  # a weight stays a weight for whoever reads it; its layer takes codes by itself
        whole = phase is Phase.INT and quantizer.role == "weight"
        assert quantizer.phase is (Phase.ROUND if whole else phase)
    assert phase_of(model) is phase
    set_phase_(model, str(phase))
    assert phase_of(model) is phase


def test_prepare_starts_in_phase_noise(x: Tensor) -> None:
    assert phase_of(prepare_(net(), x)) is Phase.NOISE


def test_going_through_all_phases_comes_back_to_the_same_numbers(model: nn.Module, x: Tensor) -> None:
    set_phase_(model, "round")
    expected = model(x)
    for phase in ("int", "int", "float", "noise", "int", "round"):
        set_phase_(model, phase)
    assert torch.equal(model(x), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_with_a_float_input_rounds_in_the_integer_domain(x: Tensor) -> None:
    model = calibrate_(prepare_(net(), x, Config(rules=[Rule("4", quantize_input=False)])), [x]).eval()
    expected = model(x)
    set_phase_(model, "int")
    assert {row.name: row.input and row.input.phase for row in layer_table(model)} == {
        "0": "int",
        "4": None,
        "5": "int",
    }
    assert phase_of(model) is Phase.INT
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_wrapper_can_be_switched(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    wrapped = nn.DataParallel(model)
    set_phase_(wrapped, "int")
    assert "forward" in vars(model[1])  # its batch norm was found behind the wrapper's prefix
    torch.testing.assert_close(wrapped.module(x), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_phase_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a phase, found 'train'\. Choose one of 'float', 'noise', 'round', 'int'"
    ):
        set_phase_(model, "train")


@pytest.mark.parametrize("call", [lambda m: set_phase_(m, "float"), lambda m: set_bits_(m, 4), phase_of])
def test_a_float_model_is_refused(call) -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        call(net())


# ---------------------------------------------------------------------- bits


def test_one_number_sets_all_but_the_models_own_input(model: nn.Module) -> None:
    set_bits_(model, 3)
    assert bits(model) == {"0": (3, 8), "4": (3, 3), "5": (3, 3)}
    assert all(quantizer.is_frozen for quantizer in quantizers(model))


def test_patterns_set_weights_and_activations_and_later_ones_win(model: nn.Module) -> None:
    set_bits_(model, {"*": 4, "5": {"weights": 8}, "[04]": {"activations": 6}})
    assert bits(model) == {"0": (4, 6), "4": (4, 6), "5": (8, 4)}


def test_what_no_pattern_names_is_still_learned(model: nn.Module) -> None:
    set_bits_(model, {"4": {"weights": 2}})
    assert [q.name for q in quantizers(model) if not q.is_frozen] == ["0.weight", "4.input", "5.weight", "5.input"]


def test_bits_by_hand_reach_the_numbers(model: nn.Module, x: Tensor) -> None:
    set_bits_(model, {"5": {"weights": 2}})
    model(x)
    row = layer_table(model)[-1]
    assert len((row.layer.weight / row.weight.step()).round().unique()) <= 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"conv*": 4}, r"expected 'conv\*' to match a layer, found none. Correct it; layers are 0, 4, 5"),
        ({"4": {"weight": 4}}, r"4: expected the names 'weights' and 'activations', found \['weight'\]"),
        (17, r"0.weight: expected a bit-width from 2 to 16, found 17"),
        ({"4": {"activations": 1}}, r"4.input: expected a bit-width from 2 to 16, found 1"),
    ],
)
def test_wrong_bits_are_refused(model: nn.Module, choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_bits_(model, choice)


def test_bits_of_an_input_that_stays_float_are_refused(x: Tensor) -> None:
    model = prepare_(net(), x, Config(rules=[Rule("4", quantize_input=False)]))
    set_bits_(model, {"*": 4})
    with pytest.raises(ConfigError, match="4: expected a quantized input, found one that stays float"):
        set_bits_(model, {"4": {"activations": 4}})
