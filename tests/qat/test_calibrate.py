from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config
from nipq.errors import ConfigError, NonFiniteError, OrderError
from nipq.functional.clipping import SAMPLE_SIZE, noise_optimal_range
from nipq.functional.grid import SIGNED, UNSIGNED
from nipq.prepare.batches import to_device
from nipq.prepare.layer_table import layer_table, phase_of, quantizers, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def prepared(**settings: object) -> nn.Sequential:
    return prepare_(net(), torch.zeros(1, 6), Config(**settings))


# ---------------------------------------------------------------------- boundaries and grids


def test_boundaries_come_from_the_float_model() -> None:
    model = prepared()
    batches = [torch.randn(20, 6) for _ in range(3)]
    assert calibrate_(model, batches) is model
    first, last = layer_table(model)
    torch.testing.assert_close(first.input.alpha, noise_optimal_range(torch.cat(batches), 8.0, SIGNED))
    set_phase_(model, "float")
    hidden = torch.relu(first.layer(torch.cat(batches)))
    torch.testing.assert_close(last.input.alpha, noise_optimal_range(hidden, 5.0, UNSIGNED))
    assert (first.input.grid, last.input.grid) == (SIGNED, UNSIGNED)


def test_all_boundaries_start_at_the_bits_of_the_moment_and_of_the_weights_of_the_moment() -> None:
    model = prepared()
    set_bits_(model, 2)
    model.load_state_dict({key: 3 * value for key, value in net().state_dict().items()}, strict=True)
    calibrate_(model, [torch.randn(50, 6)])
    for row in layer_table(model):
        stored = row.layer.parametrizations.weight.original
        torch.testing.assert_close(row.weight.alpha, noise_optimal_range(stored, 2.0, SIGNED))


def test_only_the_batches_asked_for_are_read() -> None:
    read: list[int] = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield torch.randn(4, 6)

    calibrate_(prepared(), endless(), batches=3)
    assert len(read) == 3


def test_large_inputs_are_sampled_evenly() -> None:
    model = prepare_(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), Config(init="max", input_bits=8))
    x = torch.zeros(SAMPLE_SIZE, 4)
    x[:, 2] = 1 + torch.rand(SAMPLE_SIZE)  # one column in four; a stride of 4 would see it always or never
    calibrate_(model, [x], batches=1)
    assert layer_table(model)[0].input.alpha.item() == pytest.approx(2.0, abs=0.01)


def test_padded_columns_are_not_all_that_is_sampled() -> None:
    """Rows of 27 with a zero in front, and a number of elements that asks for every 189th: 7 rows."""
    net = nn.Sequential(nn.Conv2d(11, 2, 1))
    model = prepare_(net, torch.zeros(1, 11, 27, 27), Config(init="max", input_bits=8))
    x = torch.zeros(48, 11, 27, 27)
    assert -(-x.numel() // (SAMPLE_SIZE // 32)) in (188, 189)
    x[..., 1:] = torch.rand(48, 11, 27, 26)
    calibrate_(model, [x], batches=32)
    assert layer_table(model)[0].input.alpha.item() == pytest.approx(1.0, abs=0.01)


def test_modes_phase_and_parameters_are_as_before() -> None:
    model = prepared()
    model.train()
    model[2].eval()
    set_phase_(model, "round")
    stored = [row.layer.parametrizations.weight.original.clone() for row in layer_table(model)]
    calibrate_(model, [torch.randn(4, 6)])
    assert [module.training for module in model] == [True, True, False, True]
    assert phase_of(model) == "round"
    assert all(
        torch.equal(row.layer.parametrizations.weight.original, before)
        for row, before in zip(layer_table(model), stored, strict=True)
    )
    assert not any(quantizer._forward_pre_hooks for quantizer in quantizers(model))


def test_calibrating_in_the_integer_domain_stays_there() -> None:
    model, x = calibrate_(prepared(), [torch.randn(4, 6)]).eval(), torch.randn(4, 6)
    set_phase_(model, "int")
    calibrate_(model, [x])
    found = model(x)
    set_phase_(model, "round")
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_release_start() -> None:
    model = calibrate_(prepared(init="release"), [torch.randn(30, 6)])
    first, last = layer_table(model)
    assert first.input.alpha_raw.item() == 3.0
    assert last.input.alpha_raw.item() == 6.0
    stored = first.layer.parametrizations.weight.original
    assert first.weight.alpha_raw.item() == stored.max().item()


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict in a tuple"])
def test_batches_in_every_form(form: str) -> None:
    x, labels = torch.randn(4, 6), torch.zeros(4)
    batch = {"tensor": x, "tuple": (x, labels), "list": [x, labels], "dict in a tuple": ({"input": x}, labels)}[form]
    model = calibrate_(prepared(), [batch])
    assert all(quantizer.calibrated for quantizer in quantizers(model))


@pytest.mark.parametrize("batch", ["text", 3, (), ("text", torch.zeros(1)), None])
def test_batches_without_tensors_are_refused(batch: object) -> None:
    with pytest.raises(ConfigError, match=r"calibrate_, batch 0: expected one input, as in the example inputs, found"):
        calibrate_(prepared(), [batch])


WRONG: dict[str, tuple[Tensor, str]] = {
    "bytes": (torch.zeros(4, 6, dtype=torch.uint8), r"floating-point numbers.*found torch.uint8\. Cast it"),
    "float64": (torch.zeros(4, 6).double(), r"its forward fails on float64 \[4, 6\]"),
    "empty": (torch.zeros(0, 6), r"expected a sample at least, found none in float32 \[0, 6\]"),
    "a sample": (torch.zeros(6), r"expected a batch of 2 axes.*found shape \[6\]\. Put a DataLoader"),
    "width": (torch.zeros(4, 5), r"its forward fails on float32 \[4, 5\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_batches_that_the_model_does_not_take_are_refused_by_number(kind: str) -> None:
    batch, message = WRONG[kind]
    with pytest.raises(ConfigError, match=f"calibrate_, batch 1: .*{message}"):
        calibrate_(prepared(), [torch.randn(4, 6), batch])


def test_one_sample_of_nan_is_refused_wherever_it_stands() -> None:
    batches = [torch.randn(SAMPLE_SIZE // 8, 6) for _ in range(2)]  # so large that calibration keeps few values
    for bad in (torch.nan, torch.inf):
        batches[1][77, 3] = bad
        with pytest.raises(NonFiniteError, match=r"calibrate_, batch 1: .*expected finite.*\(sample 77\)\. Leave such"):
            calibrate_(prepared(), batches)


def test_batches_of_several_sizes_and_fewer_than_asked_for_will_do() -> None:
    model = calibrate_(prepared(init="max"), [torch.full((n, 6), float(n)) for n in (1, 5, 2)], batches=50)
    assert layer_table(model)[0].input.alpha.item() == pytest.approx(5.0, rel=0.01)
    with pytest.raises(ConfigError, match="expected batches of at least 1, found 0"):
        calibrate_(prepared(), [torch.zeros(1, 6)], batches=0)


def test_moving_inputs_keeps_their_form() -> None:
    x, cpu = torch.zeros(2), torch.device("cpu")
    assert to_device(x, cpu) is x
    assert to_device({"a": x, "b": 3}, cpu) == {"a": x, "b": 3}
    assert to_device((x, "text"), cpu) == (x, "text")


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one batch, found an empty loader"):
        calibrate_(prepared(), [])
    with pytest.raises(ConfigError, match="calibrate_: expected a loader, an iterable of batches, found None"):
        calibrate_(prepared(), None)  # type: ignore[arg-type]


def test_activations_that_are_not_finite_are_refused_by_name_and_leave_the_modes() -> None:
    model = prepared().train()
    x = torch.randn(4, 6)
    x[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"own input: expected finite numbers while calibrating.*\(sample 0\)"):
        calibrate_(model, [x])
    assert model.training
    assert phase_of(model) == "noise"


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if len(x) > 1 else 0)


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = prepare_(Optional(), torch.zeros(2, 2))
    with pytest.raises(OrderError, match=r"sometimes\.input: expected the calibration batches to reach it"):
        calibrate_(model, [torch.randn(1, 2)])


def test_a_float_model_is_refused() -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        calibrate_(net(), [torch.zeros(1, 6)])
