"""From stage to stage: what happens to the model between two stretches of training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.budget.allocate import allocate_bits_, uniform_bits_
from nipq.budget.freeze import freeze_bits_
from nipq.budget.hawq import allocate_
from nipq.config import Phase
from nipq.distributed import from_rank_zero
from nipq.prepare.layer_table import quantizers, set_phase_
from nipq.qat.batchnorm import reestimate_bn_
from nipq.qat.calibrate import calibrate_
from nipq.train.batches import Few, Split
from nipq.train.guard import check_state
from nipq.train.nested import Nested, moved
from nipq.train.seeds import seed_of

if TYPE_CHECKING:
    from nipq.budget.budget import Budget
    from nipq.train.batches import Sources
    from nipq.train.checkpoint import Progress
    from nipq.train.config import TrainConfig
    from nipq.train.objective import Objective
    from nipq.train.task import Task


class Run(Protocol):
    """What these steps need of a :class:`~nipq.train.trainer.Trainer`; see there."""

    config: TrainConfig
    model: nn.Module
    budget: Budget | None
    device: torch.device
    data: Sources
    train: Split
    task: Task
    objective: Objective
    progress: Progress
    is_sharded: bool

    def prepare(self) -> None:
        """Attach quantizers to the model."""

    def seed(self, *what: int | str) -> None:
        """Start torch's generators for a purpose."""

    def autocast(self) -> torch.autocast:
        """The precision in which losses that train the model are computed."""


def leave_float(run: Run) -> None:
    """Prepare and calibrate the float model, and start or fix its bits."""
    record(run, "float")
    run.prepare()
    config, budget, model = run.config, run.budget, run.model
    if budget is not None and config.allocation == "uniform":
        uniform_bits_(model, budget)
    calibrate(run)
    key = seed_of(config.seed, "allocation")
    batches = Few(run.train, len(run.train), key)
    if budget is not None and config.allocation == "hawq":
        allocate_(model, batches, run.task.loss, budget, seed=key)
        calibrate(run)  # boundaries belong to bit-widths
    elif budget is not None and config.bit_start == "noise" and _learns_bits(run):
        with run.autocast():
            allocate_bits_(model, _answered(run, batches), budget, run.objective.compare, seed=key)
        calibrate(run)


def leave_search(run: Run) -> None:
    """Freeze the bits within the budget, and measure batch norms anew."""
    freeze_bits_(run.model, run.budget)
    set_phase_(run.model, Phase.ROUND)
    record(run, "frozen")
    if _reestimate(run):
        record(run, "bn")


def leave_finetune(run: Run) -> None:
    """Measure batch norms anew."""
    if run.config.stages.finetune.epochs:
        _reestimate(run)
        record(run, "finetuned")


LEAVE = {"float": leave_float, "search": leave_search, "finetune": leave_finetune}


def record(run: Run, name: str) -> None:
    """Score a finished state on held-out and test samples. The only place that reads the test targets."""
    check_state(run.model, f"in the {name} model")
    started = time.perf_counter()
    splits: dict[str, Split | None] = {"validation": run.data.validation, "test": run.data.test}
    scores = {key: scored(run, split) for key, split in splits.items() if split is not None}
    run.progress.states[name] = scores
    run.progress.seconds += time.perf_counter() - started


def scored(run: Run, split: Split) -> dict[str, float]:
    """Score the model; of several processes the first does, unless each holds a part of the model only."""
    if run.is_sharded:
        return run.task.scores(run.model, split)
    return from_rank_zero(lambda: run.task.scores(run.model, split))


def calibrate(run: Run) -> None:
    """Start boundaries and grids afresh, from the config's number of batches."""
    count, key = run.config.calibration_batches, seed_of(run.config.seed, "calibration")
    calibrate_(run.model, Few(run.train, count, key), count)


def _answered(run: Run, batches: Few) -> Iterator[tuple[Nested, tuple[Any, Any]]]:
    """Batches with all that the objective compares outputs with."""
    for inputs, targets in batches:
        inputs = moved(inputs, run.device, channels_last=run.config.channels_last)
        yield inputs, (moved(targets, run.device), run.objective.answers(inputs))


def _learns_bits(run: Run) -> bool:
    return any(not quantizer.is_frozen for quantizer in quantizers(run.model))


def _reestimate(run: Run) -> bool:
    count, stage = run.config.batchnorm_batches, run.progress.stage
    if count and any(isinstance(module, _BatchNorm) for module in run.model.modules()):
        run.seed("batchnorm", stage)
        key = seed_of(run.config.seed, "batchnorm", stage)
        reestimate_bn_(run.model, Few(run.train, count, key), count)
        return True
    return False
