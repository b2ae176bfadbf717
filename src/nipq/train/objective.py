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
        return self.compare(outputs, (targets, self.answers(inputs)))

    def answers(self, inputs: Nested) -> Any:  # noqa: ANN401 - the task knows
        """What the teacher says to a batch; ``None`` without one."""
        return None if self.teacher is None else outputs_of(self.teacher, inputs)

    def compare(self, outputs: Any, expected: tuple[Any, Any]) -> Tensor:  # noqa: ANN401 - the task knows
        """The loss, for callers that know no inputs.

        Args:
            outputs: What the model returned.
            expected: Targets, and the teacher's answers or ``None``.

        Returns:
            The loss, shape ().
        """
        targets, answers = expected
        loss = self.task.loss(outputs, targets)
        return loss if answers is None else loss + self.weight * self.task.distillation(outputs, answers)
