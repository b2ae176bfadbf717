"""Data that cannot be trained on are refused before training; a number that is not finite is traced to its layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError, NonFiniteError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.train.batches import Sources, TensorSplit
from nipq.train.checks import check_state, non_finite_loss, preflight
from nipq.train.config import check_config
from nipq.train.models import digits_net
from nipq.train.task import Classification

EXAMPLE = torch.randn(2, 1, 8, 8)


class Explodes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros_like(x)


@pytest.fixture
def model() -> nn.Module:
    return digits_net(width=4)


def test_healthy_model_passes(model: nn.Module) -> None:
    check_state(model, "now")


def test_boundary_is_named(model: nn.Module) -> None:
    prepare_(model, EXAMPLE)
    quantizer = layer_table(model)[2].weight
    with torch.no_grad():
        quantizer.alpha_raw.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"now.*the clipping range of {quantizer.name}"):
        check_state(model, "now")


def test_weight_is_named(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("classifier.bias")[1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"classifier\.bias"):
        check_state(model, "now")


def test_first_layer_with_a_bad_output_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Explodes(), nn.Linear(8, 3))
    error = non_finite_loss(model, EXAMPLE, "in epoch 1")
    assert "in epoch 1" in str(error)
    assert "first in the output of 2;" in str(error)


def test_bad_images_are_said_to_be_bad(model: nn.Module) -> None:
    images = copy.deepcopy(EXAMPLE)
    images[0, 0, 0, 0] = float("nan")
    assert "already in the inputs" in str(non_finite_loss(model, images, "now"))


def test_loss_alone(model: nn.Module) -> None:
    assert "in the loss itself" in str(non_finite_loss(model, EXAMPLE, "now"))


# ---------------------------------------------------------------------- data, before the first step


CONFIG = check_config(
    {
        "model": {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}},
        "data": {"kind": "digits"},
        "budget": {"average_bits": {"weights": 4}},
    }
)


def images(count: int, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, size, size), torch.arange(count) % 10


def splits(**changed: tuple[Tensor, Tensor | None]) -> Sources:
    made = {
        name: TensorSplit(*changed.get(name, images(12)), batch_size=4, eval_batch_size=5)
        for name in ("train", "validation", "test")
    }
    return Sources(**made)


def check(data: Sources, model: nn.Module) -> None:
    preflight(model, next(iter(data.test))[0][:1], data, Classification(), CONFIG, None)


def test_sound_data_pass(model: nn.Module) -> None:
    check(splits(), model)
    check(Sources(splits().train, None, splits().test), model)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("label", [-1, 10, -100])
def test_a_label_out_of_range_is_found_in_any_split(model: nn.Module, name: str, label: int) -> None:
    inputs, labels = images(12)
    labels[7] = label
    where = {"train": "training"}.get(name, name)
    with pytest.raises(ConfigError, match=rf"batch 1 of the {where} split.*from 0 to 9.*found {label} at sample 2"):
        check(splits(**{name: (inputs, labels)}), model)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_nan_is_found_in_any_split(model: nn.Module, name: str) -> None:
    inputs, labels = images(12)
    inputs[11, 0, 3, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"batch 2 of the \w+ split: .*NaN in the inputs of sample 1"):
        check(splits(**{name: (inputs, labels)}), model)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(12), r"expected labels, torch\.int64 \[N\], found torch\.float32 \[5\]"),
        (torch.zeros(12, 10, dtype=torch.int64), r"found torch\.int64 \[5, 10\]"),
        (torch.zeros(11, dtype=torch.int64), "expected one entry of the targets for each of its 2 samples"),
        (None, "found NoneType"),
    ],
)
def test_targets_of_another_form_are_refused(model: nn.Module, targets: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(splits(validation=(images(12)[0], targets)), model)


def test_every_shape_of_samples_is_run_before_training() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    check(splits(), model)
    with pytest.raises(ConfigError, match=r"inputs of shape \(1, 1, 9, 9\) out of batch 0 of the validation split"):
        check(splits(validation=images(12, size=9)), model)


def test_outputs_that_are_no_logits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected the model to answer with logits.*found \(1, 2, 8, 8\)"):
        check(splits(), nn.Conv2d(1, 2, 3, padding=1))
