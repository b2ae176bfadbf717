"""The task loss: cross entropy with the labels, and with a teacher's answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross entropy between softened answers.

    ``-T^2 mean_n sum_c softmax(teacher / T)_c log softmax(student / T)_c``; the factor keeps the gradient's size.

    Paper: the release's soft cross entropy, with T = 1.

    Args:
        student: Logits, [N, C].
        teacher: Logits, [N, C], no gradient.
        temperature: T > 0.

    Returns:
        The loss, shape ().
    """
    return cross_entropy(student / temperature, (teacher / temperature).softmax(-1)) * temperature**2


@dataclass(frozen=True)
class Objective:
    """What a batch's logits are scored by.

    Attributes:
        label_smoothing: Of the cross entropy with the labels.
        teacher: A float model in evaluation mode, or ``None``.
        weight: Factor on the distillation loss.
        temperature: Of the distillation loss.
    """

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: [N, C].
            images: What the logits were computed from, for the teacher.
            labels: [N] int64.

        Returns:
            The loss, shape ().
        """
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad():
                answers = self.teacher(images)
            loss = loss + self.weight * distillation(logits, answers, self.temperature)
        return loss
