"""The task loss against closed forms in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.train.batches import Sources, TensorSplit
from nipq.train.task import Classification, Objective, Task, predictions


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_softened_cross_entropy(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    target = (teacher / temperature).exp() / (teacher / temperature).exp().sum(-1, keepdim=True)
    log_p = student / temperature - (student / temperature).exp().sum(-1, keepdim=True).log()
    expected = -(temperature**2) * (target * log_p).sum(-1).mean()
    torch.testing.assert_close(Classification(temperature=temperature).distillation(student, teacher), expected)


def test_distillation_has_no_slope_where_student_equals_teacher() -> None:
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    Classification(temperature=2.0).distillation(student, student.detach()).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_label_smoothing_mixes_with_the_uniform_distribution() -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    log_p = logits.log_softmax(-1)
    expected = -(0.9 * log_p[range(5), labels] + 0.1 * log_p.mean(-1)).mean()
    torch.testing.assert_close(Classification(label_smoothing=0.1).loss(logits, labels), expected)


def test_teacher_is_added_with_its_weight_and_gets_no_gradient() -> None:
    images, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    task, teacher = Classification(temperature=2.0), nn.Linear(3, 3).double()
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = {"inputs": images, "targets": labels}
    alone = Objective(task)(logits, expected)
    together = Objective(task, teacher, weight=0.5)(logits, expected)
    torch.testing.assert_close(together - alone, 0.5 * task.distillation(logits, teacher(images)))
    together.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_scores_are_means_over_samples_not_over_batches() -> None:
    images, labels = torch.randn(10, 3), torch.arange(10) % 3
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    split = TensorSplit(images, labels, batch_size=4, eval_batch_size=4)
    scores = Classification().scores(model, split)
    logits = model.eval()(images).detach()
    assert scores["count"] == 10
    assert scores["loss"] == pytest.approx(float(Classification().loss(logits, labels)), rel=1e-5)
    assert scores["accuracy"] == 10.0 * int((logits.argmax(-1) == labels).sum())


def test_predictions_restore_the_mode_and_keep_no_graph() -> None:
    model = nn.Linear(3, 3).train()
    for outputs, targets in predictions(model, [(torch.randn(2, 3), None)]):
        assert not model.training
        assert not outputs.requires_grad
        assert targets is None
        assert torch.is_grad_enabled()
    assert model.training


class Bare(Task):
    metric = "error"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return (outputs - targets).square().mean()

    def scores(self, model: nn.Module, batches: Any) -> dict[str, float]:
        return {"loss": 0.0, "error": 0.0}


def test_task_without_distillation_refuses_a_teacher() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ConfigError, match="found Bare without distillation"):
        Objective(Bare(), nn.Linear(3, 3))(x, {"inputs": x, "targets": x})


@pytest.mark.parametrize(("outputs", "found"), [(torch.zeros(1, 4), r"\(1, 4\)"), ({"a": torch.zeros(1, 10)}, "dict")])
def test_too_few_logits_are_refused(outputs: Any, found: str) -> None:
    split = TensorSplit(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), batch_size=4, eval_batch_size=4)
    with pytest.raises(ConfigError, match=rf"\(1, 10\) logits for 10 classes, found {found}"):
        Classification().check(outputs, Sources(split, None, split, classes=10))
    if isinstance(outputs, torch.Tensor):
        Classification().check(outputs, Sources(split, None, split))  # nothing known about classes
    else:
        with pytest.raises(ConfigError, match="expected the model to answer with logits of each class, found dict"):
            Classification().check(outputs, Sources(split, None, split))
