from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from experiments.tasks.efficientnet_lite0 import (
    Agreement,
    divergence,
)
from nipq.train.config import ModelConfig


class Answers(nn.Module):
    """Gives its inputs as logits, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def agreement(model: nn.Module) -> Agreement:
    judge = Agreement(ModelConfig(factory="x:y", weights="none"))
    judge._network = model
    return judge


def test_scores_of_the_float_network_and_of_its_opposite() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    labelled = [(logits[:1], torch.tensor([[True, True, False]])), (logits[1:], torch.tensor([[False, False, True]]))]
    judge = agreement(Answers())
    assert judge.scores(Answers(), labelled) == {"loss": 0.0, "agreement": 100.0, "count": 2, "top1": 50.0}
    opposite = judge.scores(Answers(-1.0), iter(labelled))
    assert opposite["agreement"] == 0.0
    assert opposite["top1"] == 50.0
    assert "top1" not in judge.scores(Answers(), [(logits, None)])


def test_losses_in_closed_form() -> None:
    outputs, truth = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, math.log(3.0)]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(outputs, truth).tolist() == pytest.approx([expected])
    judge = agreement(Answers())
    loss = judge.distillation(outputs, truth)
    (slope,) = torch.autograd.grad(loss, outputs)
    assert torch.allclose(slope, torch.tensor([[0.25, -0.25]]))  # softmax(outputs) - softmax(truth)
    assert float(judge.loss(outputs, None)) == 0.0
