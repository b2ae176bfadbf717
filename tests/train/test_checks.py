"""A number that is not finite is traced to the layer where it arose."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import NonFiniteError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.train.checks import check_state, non_finite_loss
from nipq.train.models import digits_net

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
