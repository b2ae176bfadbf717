"""Tasks: a loss, a loss against a teacher, and a metric; classification, and the objective of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nipq.errors import ConfigError
from nipq.prepare.batches import call_model, device_of, evaluating
from nipq.train.batches import Batch, Nested, Sources, moved


class Task(ABC):
    """A task. Subclasses give the three attributes, :meth:`loss` and :meth:`scores`; the rest as they need it.

    Attributes:
        metric: name of the number that results are compared by, a key of :meth:`scores`, e.g. ``accuracy``.
        unit: its unit, e.g. ``%``; empty for a pure number.
        higher_is_better: its direction.
    """

    metric: str
    unit: str = ""
    higher_is_better: bool = True

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:  # noqa: ANN401 - what model and data give
        """Loss of a batch, shape (); zero for a task that is learned from the teacher alone.

        Args:
            outputs: the model's outputs.
            targets: second item of the batch.
        """

    def distillation(self, outputs: Any, teacher_outputs: Any) -> Tensor:  # noqa: ANN401, ARG002 - for subclasses
        """Distance of a batch's outputs from the teacher's, shape ().

        Args:
            outputs: the model's outputs.
            teacher_outputs: the teacher's for the same inputs, without gradient.

        Raises:
            ConfigError: if the task cannot learn from a teacher.
        """
        raise ConfigError(
            f"expected a task that can learn from a teacher, found {type(self).__name__} without distillation; "
            "define it, or leave teacher out"
        )

    @abstractmethod
    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Score a model in evaluation mode; :func:`predictions` runs it.

        Args:
            model: the float, the trained or the deployed model.
            batches: inputs and targets.

        Returns:
            At least ``loss`` and the metric.
        """

    def batch_total(self, outputs: Any, targets: Any) -> Tensor | float | None:  # noqa: ANN401, ARG002
        """Sum of the metric over the samples of a training batch, or ``None`` if it is no mean over samples.

        A tensor of shape () lets the next step begin before a GPU has computed it.
        """
        return None

    def check(self, outputs: Any, data: Sources) -> None:  # noqa: ANN401, B027 - most tasks accept anything
        """Refuse a model whose outputs do not fit the data, before training.

        Args:
            outputs: the model's outputs for one sample.
            data: the splits.

        Raises:
            ConfigError: if they do not fit.
        """

    def check_targets(self, targets: Any, outputs: Any, where: str) -> None:  # noqa: ANN401, B027 - as above
        """Refuse targets that no loss can be computed from, before training.

        Args:
            targets: second item of a batch.
            outputs: the model's outputs for one sample.
            where: names the batch, for the message.

        Raises:
            ConfigError: if they do not fit.
        """

    def to_dict(self) -> dict[str, Any]:
        """Name, unit and direction of the metric, for the results."""
        return {"name": self.metric, "unit": self.unit, "higher_is_better": self.higher_is_better}


def predictions(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Any, Any]]:
    """Run a model in evaluation mode, without gradients, over batches; every module's mode is restored.

    Args:
        model: any model.
        batches: inputs and targets.

    Yields:
        Outputs, and targets on the same device.
    """
    device = device_of(model)
    with evaluating(model):
        for inputs, targets in batches:
            yield outputs_of(model, moved(inputs, device)), moved(targets, device)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Nested) -> Any:  # noqa: ANN401 - whatever the model returns
    """Outputs for one batch, without gradients."""
    return call_model(model, inputs)


class Classification(Task):
    """Logits against labels: cross entropy and accuracy.

    Args:
        label_smoothing: of the cross entropy with the labels while training.
        temperature: of the distillation loss.
    """

    metric = "accuracy"
    unit = "%"

    def __init__(self, label_smoothing: float = 0.0, temperature: float = 1.0) -> None:
        """Keep the settings."""
        self.label_smoothing = label_smoothing
        self.temperature = temperature

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy.

        Args:
            outputs: logits, [N, C].
            targets: labels, [N] int64.
        """
        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Cross entropy between softened answers.

        ``-T^2 mean_n sum_c softmax(teacher / T)_c log softmax(student / T)_c``; the factor keeps the gradient's size.

        Paper: the release's soft cross entropy, with T = 1.

        Args:
            outputs: logits, [N, C].
            teacher_outputs: logits, [N, C].
        """
        temperature = self.temperature
        return cross_entropy(outputs / temperature, (teacher_outputs / temperature).softmax(-1)) * temperature**2

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Score a model.

        Returns:
            ``loss`` (mean cross entropy), ``accuracy`` (per cent, 0 to 100) and ``count`` (samples).
        """
        loss, total, count = 0.0, 0.0, 0
        for outputs, labels in predictions(model, batches):
            logits = outputs.float()
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            total += float(self.batch_total(logits, labels))
            count += len(labels)
        return {"loss": loss / count, "accuracy": total / count, "count": count}

    def batch_total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """100 for every right answer."""
        return 100.0 * (outputs.argmax(-1) == targets).sum().double()

    def check(self, outputs: Any, data: Sources) -> None:  # noqa: ANN401 - whatever the model returns
        """Refuse outputs that are no logits, or fewer than there are classes."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < (data.classes or 0):
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            wanted = "logits of each class" if data.classes is None else f"(1, {data.classes}) logits"
            raise ConfigError(
                f"expected the model to answer with {wanted}{f' for {data.classes} classes' if data.classes else ''}, "
                f"found {found}; correct model.kwargs, or name a task of your own in task"
            )

    def check_targets(self, targets: Any, outputs: Any, where: str) -> None:  # noqa: ANN401 - whatever data hold
        """Refuse labels that are no whole numbers from 0 to below the number of logits."""
        classes = outputs.shape[1]
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
            found = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ConfigError(f"{where}: expected labels, torch.int64 [N], found {found}; correct the data")
        outside = ((targets < 0) | (targets >= classes)).nonzero()[:, 0]
        if len(outside):
            raise ConfigError(
                f"{where}: expected labels from 0 to {classes - 1}, as the model has {classes} logits, found "
                f"{int(targets[outside[0]])} at sample {int(outside[0])} of the batch; correct the data or model.kwargs"
            )


@dataclass(frozen=True)
class Objective:
    """Loss of a training step: ``loss + weight * distillation``.

    Attributes:
        task: computes both terms.
        teacher: a float model in evaluation mode, or ``None``.
        weight: factor on the distillation loss.
    """

    task: Task
    teacher: nn.Module | None = None
    weight: float = 1.0

    def __call__(self, outputs: Any, expected: dict[str, Any]) -> Tensor:  # noqa: ANN401 - the task knows
        """Loss of a batch.

        Args:
            outputs: the model's outputs.
            expected: of :meth:`expected`; the teacher's outputs are computed once and kept there.

        Returns:
            The loss, shape ().
        """
        loss = self.task.loss(outputs, expected["targets"])
        if self.teacher is None:
            return loss
        if "teacher" not in expected:
            expected["teacher"] = outputs_of(self.teacher, expected["inputs"])
        return loss + self.weight * self.task.distillation(outputs, expected["teacher"])

    def expected(self, inputs: Nested, targets: Any) -> dict[str, Any]:  # noqa: ANN401 - the task knows
        """Everything that the outputs of a batch are compared with: its targets, and its inputs for the teacher."""
        return {"inputs": inputs, "targets": targets}
