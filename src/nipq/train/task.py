"""What a network is trained for: a loss, a loss against a teacher, and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.prepare.batches import call_model
from nipq.train.batches import Batch
from nipq.train.nested import Nested, moved

if TYPE_CHECKING:
    from nipq.train.batches import Sources


class Task(ABC):
    """A task. Subclasses give the three attributes, :meth:`loss` and :meth:`scores`; the rest as they need it.

    Attributes:
        metric: Name of the number that results are compared by, a key of :meth:`scores`, e.g. ``accuracy``.
        unit: Its unit, e.g. ``%``; empty for a pure number.
        higher_is_better: Its direction.
    """

    metric: str
    unit: str = ""
    higher_is_better: bool = True

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:  # noqa: ANN401 - what model and data give
        """The loss of a batch, shape (); zero for a task that is learned from the teacher alone.

        Args:
            outputs: What the model returned.
            targets: Second item of the batch.
        """

    def distillation(self, outputs: Any, teacher_outputs: Any) -> Tensor:  # noqa: ANN401, ARG002 - for subclasses
        """How far a batch's outputs are from the teacher's, shape ().

        Args:
            outputs: What the model returned.
            teacher_outputs: What the teacher returned for the same inputs, without gradient.

        Raises:
            ConfigError: If the task cannot learn from a teacher.
        """
        raise ConfigError(
            f"expected a task that can learn from a teacher, found {type(self).__name__} without distillation; "
            "define it, or leave teacher out"
        )

    @abstractmethod
    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Score a model in evaluation mode; :func:`predictions` runs it.

        Args:
            model: The float, the trained or the deployed model.
            batches: Inputs and targets.

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
            outputs: What the model returned for one sample.
            data: The splits.

        Raises:
            ConfigError: If they do not fit.
        """

    def to_dict(self) -> dict[str, Any]:
        """Name, unit and direction of the metric, for the results."""
        return {"name": self.metric, "unit": self.unit, "higher_is_better": self.higher_is_better}


def predictions(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Any, Any]]:
    """Run a model in evaluation mode, without gradients, over batches; its mode is restored at the end.

    Args:
        model: Any model.
        batches: Inputs and targets.

    Yields:
        Outputs, and targets on the same device.
    """
    tensor = next(model.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    training = model.training
    model.eval()
    try:
        for inputs, targets in batches:
            yield outputs_of(model, moved(inputs, device)), moved(targets, device)
    finally:
        model.train(training)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Nested) -> Any:  # noqa: ANN401 - whatever the model returns
    """Outputs for one batch, without gradients."""
    return call_model(model, inputs)
