"""One run in memory: its model, its data, and the steps from a float model to a frozen one.

The stages are ``float``, ``search`` (the method's estimator; bits learned, or allocated before), ``finetune`` (bits
frozen, true quantizer or again the method's) and ``done``. :meth:`Trainer.advance` closes one and opens the next. All
randomness follows from the config's seed and the place in the run, so a run that continues from a checkpoint draws the
same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nipq.allocation import allocate_
from nipq.batchnorm import reestimate_bn_
from nipq.bit_start import start_bits_
from nipq.calibrate import calibrate_
from nipq.control import set_phase_
from nipq.errors import ConfigError
from nipq.layer_table import quantizers
from nipq.phases import Phase
from nipq.prepare import prepare_
from nipq.snap import freeze_bits_
from nipq.trace import call_model
from nipq.train.batches import Few, Split
from nipq.train.checkpoint import Checkpoint, Progress
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task
from nipq.train.guard import check_state, non_finite_loss
from nipq.train.nested import Nested, count_of, moved, pick
from nipq.train.objective import Objective
from nipq.train.preflight import make_budget, preflight
from nipq.train.seeds import seed_of
from nipq.train.stage import Stage, enter_phase_, stage_config
from nipq.train.uniform import uniform_bits_

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

NEXT = {"float": "search", "search": "finetune", "finetune": "done"}


class Trainer:
    """The state of a run and what moves it on.

    Args:
        config: The run's config.
        checkpoint: Where to continue, or ``None`` to start.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint | None = None) -> None:
        """Load data and model, and check that they fit each other and the budget."""
        self.config = config
        self.device = pick_device(config.device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.data = load_data(config.data, config.seed)
        self.budget = None if config.budget is None else make_budget(config.budget)
        self.task = build_task(config)
        self.example = pick(next(iter(self.data.test))[0], slice(1))
        self._seed("model")
        self.model = build_model(config.model, with_weights=checkpoint is None)
        self.feasible = (
            preflight(self.model, self.example, config, self.budget, partial(self.task.check, data=self.data))
            if checkpoint is None
            else []
        )
        self.model.to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective = self._objective()
        self.progress = Progress() if checkpoint is None else checkpoint.progress
        self.stage: Stage | None = None
        if checkpoint is not None:
            self._load_model(checkpoint.model)
        self._enter()
        if checkpoint is not None and self.stage is not None:
            self.stage.load(checkpoint)

    # ------------------------------------------------------------------ training

    @property
    def epochs(self) -> int:
        """Epochs of the present stage."""
        stage = self.progress.stage
        return 0 if stage == "done" else stage_config(self.config, stage).epochs

    def step(self, inputs: Nested, targets: Nested | None) -> None:
        """One training step; the sums of :class:`Progress` grow by its loss and metric.

        Args:
            inputs: Of the model.
            targets: What the task compares its outputs with.

        Raises:
            NonFiniteError: If the loss is not finite, naming the layer.
        """
        assert self.stage is not None
        progress = self.progress
        self._seed(progress.stage, progress.epoch, progress.step)
        self.stage.begin(progress.epoch, progress.step)
        inputs = moved(inputs, self.device, channels_last=self.config.channels_last)
        targets = moved(targets, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == "bf16"):
            outputs = call_model(self.model, inputs)
            loss = self.objective(outputs, inputs, targets)
        total = self.stage.penalty(loss)
        if not bool(total.isfinite()):
            raise non_finite_loss(self.model, inputs, self._place())
        total.backward()  # type: ignore[no-untyped-call]
        self.stage.end()
        with torch.no_grad():
            score = self.task.batch_total(outputs, targets)
        count = count_of(inputs)
        added = (float(loss.detach()) * count, math.nan if score is None else score, count)
        progress.sums = [a + b for a, b in zip(progress.sums, added, strict=True)]
        progress.step += 1
        progress.steps_total += 1

    def validate(self) -> dict[str, float] | None:
        """Score the model, or its weight average, on the held-out samples."""
        if self.data.validation is None:
            return None
        if self.stage is None or self.stage.average is None:
            return self.task.scores(self.model, self.data.validation)
        with self.stage.average.swapped(self.model):
            return self.task.scores(self.model, self.data.validation)

    def batches(self) -> Any:  # noqa: ANN401 - an iterator of batches
        """The rest of the present epoch's training batches."""
        progress = self.progress
        key = seed_of(self.config.seed, "data", progress.stage, progress.epoch)
        return self.data.train.epoch(key, progress.step)

    # ------------------------------------------------------------------ from stage to stage

    def settle(self) -> None:
        """At the end of a stage the weight average, where there is one, becomes the model."""
        if self.stage is not None:
            self.stage.settle()

    def advance(self) -> None:
        """Close the present, settled stage, score what it left, and open the next."""
        leave = {"float": self._leave_float, "search": self._leave_search, "finetune": self._leave_finetune}
        leave[self.progress.stage]()
        self.progress.stage = NEXT[self.progress.stage]
        self.progress.epoch = self.progress.step = 0
        self._enter()

    def _leave_float(self) -> None:
        self._record("float")
        self._prepare()
        if self.budget is not None and self.config.allocation == "uniform":
            uniform_bits_(self.model, self.budget)
        self._calibrate()
        key = seed_of(self.config.seed, "allocation")
        batches = Few(self.data.train, len(self.data.train), key)
        if self.budget is not None and self.config.allocation == "hawq":
            allocate_(self.model, batches, self.task.loss, self.budget, seed=key)
            self._calibrate()  # boundaries belong to bit-widths
        elif self.budget is not None and self.config.bit_start == "noise" and self._learns_bits():
            start_bits_(self.model, self._answered(batches), self.objective.compare, self.budget, seed=key)
            self._calibrate()

    def _answered(self, batches: Few) -> Iterator[tuple[Nested, tuple[Any, Any]]]:
        """Batches with all that the objective compares outputs with."""
        for inputs, targets in batches:
            inputs = moved(inputs, self.device, channels_last=self.config.channels_last)
            yield inputs, (moved(targets, self.device), self.objective.answers(inputs))

    def _learns_bits(self) -> bool:
        return any(not quantizer.is_frozen for quantizer in quantizers(self.model))

    def _leave_search(self) -> None:
        freeze_bits_(self.model, self.budget)
        set_phase_(self.model, Phase.ROUND)
        self._record("frozen")
        if self._reestimate():
            self._record("bn")

    def _leave_finetune(self) -> None:
        if self.config.stages.finetune.epochs:
            self._reestimate()
            self._record("finetuned")

    def _enter(self) -> None:
        """Build what the present stage trains with."""
        previous, self.stage = self.stage, None
        name = self.progress.stage
        if name != "float":
            enter_phase_(self.model, self.config, name)
        if self.epochs:
            self.model.train()
            self.stage = Stage(name, self.model, self.config, self.budget, len(self.data.train), previous)

    def _reestimate(self) -> bool:
        count = self.config.batchnorm_batches
        if count and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            self._seed("batchnorm", self.progress.stage)
            key = seed_of(self.config.seed, "batchnorm", self.progress.stage)
            reestimate_bn_(self.model, Few(self.data.train, count, key), count)
            return True
        return False

    def _record(self, name: str) -> None:
        """Score a finished state on held-out and test samples. The only place that reads the test targets."""
        check_state(self.model, f"in the {name} model")
        started = time.perf_counter()
        splits: dict[str, Split | None] = {"validation": self.data.validation, "test": self.data.test}
        scores = {key: self.task.scores(self.model, split) for key, split in splits.items() if split is not None}
        self.progress.states[name] = scores
        self.progress.seconds += time.perf_counter() - started

    # ------------------------------------------------------------------ saving and loading

    def checkpoint(self) -> Checkpoint:
        """All of the run at this moment.

        Raises:
            NonFiniteError: If the model holds a number that is not finite; such a state must not replace a good one.
        """
        check_state(self.model, self._place())
        checkpoint = Checkpoint(self.progress, self.model.state_dict())
        if self.stage is not None:
            self.stage.save(checkpoint)
        return checkpoint

    def _load_model(self, state: dict[str, Tensor]) -> None:
        if self.progress.stage != "float":
            self._prepare()
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"the checkpoint does not fit the model of this config: {error}; use the run's own"
            ) from error

    # ------------------------------------------------------------------ small parts

    def _prepare(self) -> None:
        prepare_(self.model, moved(self.example, self.device), self.config.quantization)

    def _calibrate(self) -> None:
        count, key = self.config.calibration_batches, seed_of(self.config.seed, "calibration")
        calibrate_(self.model, Few(self.data.train, count, key), count)

    def _objective(self) -> Objective:
        teacher = self.config.teacher
        if teacher is None:
            return Objective(self.task)
        network: nn.Module = build_model(teacher).to(self.device).eval().requires_grad_(False)
        return Objective(self.task, network, teacher.weight)

    def _seed(self, *what: int | str) -> None:
        torch.manual_seed(seed_of(self.config.seed, *what))

    def _place(self) -> str:
        return f"in stage {self.progress.stage}, epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"


def pick_device(name: str) -> torch.device:
    """The device that a config names.

    Raises:
        ConfigError: If CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("expected a CUDA device, found none; set device to auto or cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
