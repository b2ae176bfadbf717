"""Classification: cross entropy with the labels, and with a teacher's answers; accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nipq.errors import ConfigError
from nipq.train.task import Task, predictions

if TYPE_CHECKING:
    from nipq.train.batches import Batch, Sources


class Classification(Task):
    """Logits against labels.

    Args:
        label_smoothing: Of the cross entropy with the labels while training.
        temperature: Of the distillation loss.
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
            outputs: Logits, [N, C].
            targets: Labels, [N] int64.
        """
        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Cross entropy between softened answers.

        ``-T^2 mean_n sum_c softmax(teacher / T)_c log softmax(student / T)_c``; the factor keeps the gradient's size.

        Paper: the release's soft cross entropy, with T = 1.

        Args:
            outputs: Logits, [N, C].
            teacher_outputs: Logits, [N, C].
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
        """Refuse a model with fewer logits than there are classes."""
        if data.classes is None:
            return
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < data.classes:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"expected the model to answer with (1, {data.classes}) logits for {data.classes} classes, found "
                f"{found}; correct model.kwargs"
            )
