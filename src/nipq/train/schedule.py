"""The learning rate over a run: a linear warm-up, then a half cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate, as a function of time in epochs.

    ``warmup_start + (1 - warmup_start) t / warmup`` until ``warmup``, then
    ``final + (1 - final) (1 + cos(pi (t - warmup) / (epochs - warmup))) / 2``.

    Paper: the release's schedule, ``paper_map.md`` section on the schedule.

    Attributes:
        epochs: Length of the whole curve in epochs, > 0.
        warmup: Length of the warm-up in epochs, >= 0.
        warmup_start: Factor at time 0, in (0, 1].
        final: Factor that the cosine ends with, in [0, 1].
        offset: Epochs of the curve that passed before this stage.
        per_epoch: The factor changes at epoch borders only.
    """

    epochs: float
    warmup: float = 0.0
    warmup_start: float = 0.1
    final: float = 0.0
    offset: float = 0.0
    per_epoch: bool = False

    def factor(self, epoch: int, fraction: float = 0.0) -> float:
        """The factor at a place in the stage.

        Args:
            epoch: Whole epochs of this stage that have passed.
            fraction: Part of the present epoch that has passed, in [0, 1).

        Returns:
            The factor, in [0, 1].

        Example:
            >>> recipe = Schedule(epochs=43, warmup=3, final=0.001, per_epoch=True)
            >>> [round(recipe.factor(epoch), 4) for epoch in (0, 1, 3, 40, 42)]
            [0.1, 0.4, 1.0, 0.0148, 0.0025]
        """
        time = self.offset + epoch + (0.0 if self.per_epoch else fraction)
        if time < self.warmup:
            return self.warmup_start + (1.0 - self.warmup_start) * time / self.warmup
        progress = min(1.0, (time - self.warmup) / max(self.epochs - self.warmup, 1e-9))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def tempering_share(kind: Literal["none", "linear", "cosine"], step: int, steps: int) -> float:
    """Share of the true rounding error in the noise at a step of the search.

    ``p`` or ``(1 - cos(pi p)) / 2`` with ``p = step / (steps - 1)``: 0 at the first step, 1 at the last.

    Args:
        kind: Shape of the rise; ``none`` stays at 0.
        step: Steps of the stage that have passed.
        steps: Steps of the stage.

    Returns:
        The share, in [0, 1].

    Example:
        >>> [tempering_share("linear", step, 5) for step in (0, 2, 4)]
        [0.0, 0.5, 1.0]
    """
    if kind == "none":
        return 0.0
    progress = min(1.0, step / (steps - 1)) if steps > 1 else 1.0
    return progress if kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))


def schedule_of(config: TrainConfig, stage: str) -> Schedule:
    """The schedule of a stage.

    Args:
        config: The run's config.
        stage: ``float``, ``search`` or ``finetune``.

    Returns:
        Its schedule. With ``schedule: spanning`` search and fine-tuning share one curve; otherwise each stage has its
        own and fine-tuning does without a warm-up.
    """
    settings, stages = config.optimizer, config.stages
    epochs, offset, warmup = getattr(stages, stage).epochs, 0, settings.warmup_epochs
    if settings.schedule == "spanning" and stage != "float":
        epochs = stages.search.epochs + stages.finetune.epochs
        offset = stages.search.epochs if stage == "finetune" else 0
    elif stage == "finetune":
        warmup = 0.0
    return Schedule(epochs, warmup, settings.warmup_start, settings.final, offset, settings.step == "epoch")
