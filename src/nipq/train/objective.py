"""What a batch is trained on: the task's loss, and the distance to a teacher's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nipq.train.nested import Nested
from nipq.train.task import Task, outputs_of


@dataclass(frozen=True)
class Objective:
    """``loss + weight * distillation``.

    Attributes:
        task: Knows both terms.
        teacher: A float model in evaluation mode, or ``None``.
        weight: Factor on the distillation loss.
    """

    task: Task
    teacher: nn.Module | None = None
    weight: float = 1.0

    def __call__(self, outputs: Any, inputs: Nested, targets: Any) -> Tensor:  # noqa: ANN401 - the task knows
        """The loss.

        Args:
            outputs: What the model returned.
            inputs: What it was given, for the teacher.
            targets: Second item of the batch.

        Returns:
            The loss, shape ().
        """
        loss = self.task.loss(outputs, targets)
        if self.teacher is not None:
            loss = loss + self.weight * self.task.distillation(outputs, outputs_of(self.teacher, inputs))
        return loss
