"""What one stage trains with, and one optimizer step of it.

Model and data outlive a stage; everything here is built when it begins and gone when it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nipq.budget.budget import Budget
from nipq.config import Phase
from nipq.prepare.layer_table import quantizers, set_noise_mix_, set_phase_
from nipq.qat.ema import WeightAverage
from nipq.qat.oscillation import Oscillations
from nipq.qat.search import Search
from nipq.train.optimizers import Optimizers
from nipq.train.schedule import schedule_of, tempering_share

if TYPE_CHECKING:
    from nipq.train.checkpoint import Checkpoint
    from nipq.train.config import StageConfig, TrainConfig


class Stage:
    """Optimizers, search, weight average and oscillations of a stage.

    Args:
        name: ``float``, ``search`` or ``finetune``.
        model: The model, prepared unless the stage is ``float``.
        config: The run's config.
        budget: The budget, or ``None``.
        steps: Training steps of an epoch.
        previous: The stage before, if it was of this process: momentum with ``schedule: spanning``, and oscillations,
            go on where they were.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: TrainConfig,
        budget: Budget | None,
        steps: int,
        previous: Stage | None = None,
    ) -> None:
        """Build all of it."""
        self.name = name
        self.model = model
        self.config = config
        self.steps = steps
        settings = stage_config(config, name)
        self.epochs = settings.epochs
        self.schedule = schedule_of(config, name)
        self.optimizers = Optimizers(model, config.optimizer, prepared=name != "float", lr=settings.lr)
        if name == "finetune" and previous is not None and config.optimizer.schedule == "spanning":
            self.optimizers.adopt(previous.optimizers)
        self.search: Search | None = None
        if name == "search" and budget is not None and any(not q.is_frozen for q in quantizers(model)):
            self.search = Search(model, budget, total_steps=self.epochs * steps, penalty=config.penalty)
        self.oscillations = None if name == "float" else self._oscillations(previous)
        self.average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)

    def begin(self, epoch: int, step: int) -> None:
        """Set what depends on the place in the stage: learning rates and tempering.

        Args:
            epoch: Epochs of the stage that have passed.
            step: Steps of the present epoch that have passed.
        """
        self.optimizers.scale(self.schedule.factor(epoch, step / self.steps))
        if self.name == "search" and self.config.tempering != "none":
            place = epoch * self.steps + step
            set_noise_mix_(self.model, tempering_share(self.config.tempering, place, self.epochs * self.steps))

    def penalty(self, loss: Tensor) -> Tensor:
        """The loss with all that is added to the task's: the price of bits, and the dampening of oscillations."""
        if self.search is not None:
            loss = loss + self.search.penalty()
        if self.oscillations is not None:
            loss = loss + self.oscillations.penalty()
        return loss

    def end(self, skip: Tensor | None = None) -> None:
        """Apply the gradients, then let everything follow that goes by steps.

        Args:
            skip: 1.0 to leave the parameters as they are, float32, no dimensions, where that can be told on the device.
        """
        self.optimizers.step(skip)
        if self.search is not None:
            self.search.step()
        if self.oscillations is not None:
            self.oscillations.step()
        if self.average is not None:
            self.average.update(self.model)

    def settle(self) -> None:
        """The weight average, where there is one, becomes the model."""
        if self.average is not None:
            self.average.copy_to_(self.model)
            self.average = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Put the states into a checkpoint."""
        checkpoint.optimizers = self.optimizers.state_dict()
        checkpoint.search = None if self.search is None else self.search.state_dict()
        checkpoint.average = None if self.average is None else self.average.state_dict()
        checkpoint.oscillation = None if self.oscillations is None else self.oscillations.state_dict()

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where the stage of a checkpoint was."""
        if checkpoint.optimizers is not None:
            self.optimizers.load_state_dict(checkpoint.optimizers)
        if self.search is not None and checkpoint.search is not None:
            self.search.load_state_dict(checkpoint.search)
        if self.average is not None and checkpoint.average is not None:
            self.average.load_state_dict(checkpoint.average)
        if self.oscillations is not None and checkpoint.oscillation is not None:
            self.oscillations.load_state_dict(checkpoint.oscillation)

    def _oscillations(self, previous: Stage | None) -> Oscillations | None:
        """One watch over search and fine-tuning: what was frozen in the one stays so in the other."""
        settings, stages = self.config.oscillation, self.config.stages
        if settings is None:
            return None
        if previous is not None and previous.oscillations is not None:
            return previous.oscillations
        total = (stages.search.epochs + stages.finetune.epochs) * self.steps
        return Oscillations(self.model, total, dampen=settings.dampen, freeze=settings.freeze)


def stage_config(config: TrainConfig, name: str) -> StageConfig:
    """The section of a stage."""
    found: StageConfig = getattr(config.stages, name)
    return found


def enter_phase_(model: nn.Module, config: TrainConfig, stage: str) -> None:
    """Set what the quantizers of a prepared model do in a stage.

    Args:
        model: A prepared model.
        config: The run's config.
        stage: ``search``, ``finetune`` or ``done``.
    """
    noisy = stage == "search" or (stage == "finetune" and config.stages.finetune.phase == "noise")
    set_phase_(model, Phase.NOISE if noisy else Phase.ROUND)
    if config.tempering != "none":
        set_noise_mix_(model, 0.0 if stage == "search" else 1.0)
