"""Verify names whatever is not what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.export.packed_write import save
from nipq.nn.deployed import DeployedLayer
from nipq.prepare.convert import convert
from nipq.verify import VerifyResult, verify

Make = Callable[..., tuple[nn.Module, list[Any]]]


def checks(result: VerifyResult) -> dict[str, bool]:
    return {check.name[:2]: check.passed for check in result.checks}


# ---------------------------------------------------------------------- planted faults


def one_ulp(deployed: Any) -> None:
    deployed.stem.scale[3] = torch.nextafter(deployed.stem.scale[3], torch.tensor(9.0))


def swapped_weights(deployed: Any) -> None:
    one, two = deployed.one.layer, deployed.two.layer
    one.weight, two.weight = two.weight, one.weight


def one_code(deployed: Any) -> None:
    deployed.two.weight_codes[0, 0] += 1


def one_bit_more(deployed: Any) -> None:
    layer = deployed.one
    layer.input_bits += 1
    layer.code_high = 2 * layer.code_high + 1


def zero_point_off_by_one(deployed: Any) -> None:
    layer = deployed.two
    assert layer.grid == "shifted"
    layer.zero_point += 1
    layer.code_low -= 1
    layer.code_high -= 1


def offset(deployed: Any) -> None:
    deployed.depthwise.offset[0] += 0.01


def step(deployed: Any) -> None:
    deployed.head.input_step.mul_(1.01)


def float_part(deployed: Any) -> None:
    deployed.extra = nn.Linear(1, 1)


def unconverted(deployed: Any) -> None:
    deployed.head = nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("fault", "where", "what"),
    [
        (one_ulp, "stem", "scale: 1 of 8 differ"),
        (swapped_weights, "one", "weight"),
        (one_code, "two", "weight codes: 1 of 64 differ"),
        (one_bit_more, "one", "input bits"),
        (zero_point_off_by_one, "two", "zero point"),
        (offset, "depthwise", "offset: 1 of 8 differ"),
        (step, "head", "step of the input"),
        (float_part, "extra.weight", "only deployed"),
        (unconverted, "head", "does not"),
    ],
)
def test_a_planted_fault_is_found_without_running_anything(
    trained: Any, fault: Callable[[Any], None], where: str, what: str
) -> None:
    model, data = trained
    deployed = convert(model)
    fault(deployed)
    result = verify(model, deployed, data)
    assert not result
    assert not checks(result)["E0"]
    assert result.first_difference is not None
    assert result.first_difference.startswith(where)
    assert what in str(result.checks[0].first_difference)
    assert "DIFFERS" in str(result)


@pytest.mark.parametrize("fault", [swapped_weights, zero_point_off_by_one, offset, step])
def test_a_fault_that_matters_is_found_by_running_as_well(trained: Any, fault: Callable[[Any], None]) -> None:
    model, data = trained
    deployed = convert(model)
    fault(deployed)
    result = checks(verify(model, deployed, data))
    assert not result["E1"]
    assert not result["E3"]


class OtherArithmetic(DeployedLayer):
    """Rightly converted, wrongly computed: E0 cannot see it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * (1 + 1e-4)


class ShortRange(DeployedLayer):
    """Clips one code too early."""

    def codes(self, x: Tensor) -> Tensor:
        return super().codes(x).clamp(max=self.code_high - 1)


class FractionalShift(DeployedLayer):
    """A shift that is no whole number of steps: codes are counted from between two levels."""

    def codes(self, x: Tensor) -> Tensor:
        return super().codes(x + 0.4 * self.input_step)


def test_a_layer_that_computes_otherwise_is_found_and_named(trained: Any) -> None:
    model, data = trained
    deployed = convert(model)
    deployed.one.__class__ = OtherArithmetic
    result = verify(model, deployed, data)
    assert checks(result)["E0"]
    assert not checks(result)["E1"]
    assert result.first_difference is not None
    assert result.first_difference.startswith("one: the output differs by")


@pytest.mark.parametrize("otherwise", [ShortRange, FractionalShift])
def test_a_quantizer_that_computes_otherwise_is_found_and_named(trained: Any, otherwise: type) -> None:
    model, data = trained
    deployed = convert(model)
    deployed.two.__class__ = otherwise
    result = verify(model, deployed, data)
    assert checks(result)["E0"]
    assert result.first_difference is not None
    assert result.first_difference.startswith("two:")
    assert "codes differ on the same input" in result.first_difference


def test_a_missing_activation_shows_in_the_next_layers_codes(trained: Any) -> None:
    """Every layer is right, but what happens between two of them is not."""
    model, data = trained
    deployed = convert(model)
    deployed.stem_bn = nn.Hardtanh(0.0, 0.5)
    result = verify(model, deployed, data)
    assert checks(result)["E0"]
    assert not checks(result)["E1"]
    assert str(result.first_difference).startswith("depthwise: codes of what arrived")


def test_a_wrong_output_without_any_layer_at_fault_is_found(made: Make) -> None:
    model, data = made()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return 2 * self.inner(x)

    prepared = nn.Sequential(model)
    deployed = convert(prepared)
    deployed[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    result = verify(prepared, deployed, data)
    assert checks(result) == {"E0": True, "E1": False, "E2": False, "E3": False}
    assert "the model's results: the output differs" in str(result.first_difference)
    assert "of the largest apart" in str(result.checks[2].first_difference)
    assert result.checks[3].first_difference == "the outputs differ though all codes agree"


# ---------------------------------------------------------------------- the file


def test_a_file_of_another_training_is_found(made: Make, trained: Any, tmp_path: Path) -> None:
    model, data = trained
    other, _ = made(bits=(3, 4))
    path = save(convert(other), tmp_path / "model")
    result = verify(model, convert(model), data, file=path)
    assert checks(result) == {"E0": False, "E1": True, "E2": True, "E3": True}
    assert "promised" in str(result.first_difference)


def test_a_file_whose_numbers_differ_is_found(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    wrong = convert(model)
    one_ulp(wrong)
    result = verify(model, convert(model), data, file=save(wrong, tmp_path / "model"))
    assert str(result.first_difference).startswith("stem: scale: 1 of 8 differ")
    assert "saved against in the file" in str(result.first_difference)


def test_a_file_that_cannot_be_read_fails_the_first_check(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    path = tmp_path / "model"
    path.write_text("no model")
    result = verify(model, convert(model), data, file=path)
    assert not checks(result)["E0"]
    assert "expected a whole safetensors file" in str(result.first_difference)
