"""The task loss against closed forms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nipq.train.objective import Objective, distillation


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_softened_cross_entropy(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    target = (teacher / temperature).exp() / (teacher / temperature).exp().sum(-1, keepdim=True)
    log_p = student / temperature - (student / temperature).exp().sum(-1, keepdim=True).log()
    expected = -(temperature**2) * (target * log_p).sum(-1).mean()
    torch.testing.assert_close(distillation(student, teacher, temperature), expected)


def test_distillation_has_no_slope_where_student_equals_teacher() -> None:
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    distillation(student, student.detach(), 2.0).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_teacher_is_added_with_its_weight_and_gets_no_gradient() -> None:
    images, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    teacher = nn.Linear(3, 3).double()
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    alone = Objective()(logits, images, labels)
    together = Objective(teacher=teacher, weight=0.5, temperature=2.0)(logits, images, labels)
    torch.testing.assert_close(together - alone, 0.5 * distillation(logits, teacher(images), 2.0))
    together.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
