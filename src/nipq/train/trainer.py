"""Training loop of a run: a float stage, then a :class:`nipq.QATSession`, on one process or several.

The stages are ``float``, ``search`` and ``finetune`` (the session's) and ``done``. All randomness follows from the
config's seed and the place in the run, so a run that continues from a checkpoint draws the same numbers. Of several
processes each trains on a slice of every batch, and the noise differs between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nipq.distributed import all_or_none, check_same_, from_rank_zero, is_distributed, rank_seed
from nipq.errors import ConfigError, DistributedError, NonFiniteError
from nipq.functional.counter_rng import seed_of
from nipq.prepare.batches import call_model
from nipq.prepare.prepare import prepare_
from nipq.qat.ema import WeightAverage
from nipq.qat.schedule import resume_, schedulers
from nipq.qat.session import QATSession, calibrate_and_allocate_
from nipq.train.batches import Batch, Few, Nested, Split, count_of, moved, pick
from nipq.train.checkpoint import Checkpoint, Progress, whole_state
from nipq.train.checks import Tally, check_state, make_budget, non_finite_loss, preflight
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task
from nipq.train.optim import apply_, load_states_, make_optimizers, schedule_of
from nipq.train.parallel import explained, join_, make_accelerator, part_, share
from nipq.train.task import Objective

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

#: On a GPU, reading a number waits for all that it was asked to do, so losses are looked at once in so many steps.
LOOK_EVERY = {"cuda": 50}


class Trainer:
    """State of a run in memory, and the steps from a float model to a frozen one.

    Args:
        config: the run's config.
        checkpoint: the state to continue from, or ``None`` to start.
        accelerator: of :func:`nipq.train.parallel.make_accelerator`; made from the config if left out.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint | None = None, accelerator: Any = None) -> None:  # noqa: ANN401
        """Load data and model, and check that they fit each other and the budget."""
        self.config = config
        self.accelerator = accelerator or make_accelerator(config)
        self.device: torch.device = self.accelerator.device
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.data = load_data(config.data, config.seed)
        self.budget = None if config.budget is None else make_budget(config.budget)
        self.train: Split = share(self.data.train, config.data.batch_size)
        self.task = build_task(config)
        self.example = pick(next(iter(self.data.test))[0], slice(1))
        torch.manual_seed(seed_of(config.seed, "model"))
        self.model = build_model(config.model, with_weights=checkpoint is None)
        self.feasible = (
            preflight(self.model, self.example, self.data, self.task, config, self.budget) if checkpoint is None else []
        )
        if checkpoint is None:
            check_same_(self.model, "nipq train")
        self._place_model()
        self.objective = self._objective()
        self.progress = Progress() if checkpoint is None else checkpoint.progress
        self.session: QATSession | None = None
        self.optimizers: list[Optimizer] = []
        self._schedulers: list[LambdaLR] = []
        self._average: WeightAverage | None = None
        self.is_sharded = False
        self.look_every = LOOK_EVERY.get(self.device.type, 1)
        if checkpoint is not None:
            self._load_model(checkpoint.model)
        self._enter(checkpoint)

    # ------------------------------------------------------------------ training

    @property
    def epochs(self) -> int:
        """Epochs of the present stage."""
        stage = self.progress.stage
        return 0 if stage == "done" else int(getattr(self.config.stages, stage).epochs)

    @property
    def rate(self) -> float:
        """Present learning rate of the weights."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def step(self, inputs: Nested, targets: Nested | None) -> None:
        """Take one optimizer step; :meth:`follow` comes next.

        The sums of :class:`Progress` grow by its loss and metric. On a GPU they are brought up to date, and losses that
        are not finite are noticed, once in ``LOOK_EVERY`` steps; after such a loss, in whichever process, no step
        changes a parameter.

        Args:
            inputs: of the model.
            targets: compared with its outputs by the task.

        Raises:
            NonFiniteError: if a loss is not finite, naming the layer.
            DistributedError: if another process is gone.
        """
        progress = self.progress
        self._seed_step(progress.step)
        inputs = moved(inputs, self.device, channels_last=self.config.channels_last)
        targets = moved(targets, self.device)
        try:
            with self.accelerator.autocast():
                outputs = call_model(self.network, inputs)
                loss = self.objective(outputs, self.objective.expected(inputs, targets))
            total = loss if self.session is None else loss + self.session.penalty()
            bad = None if self.look_every == 1 else self.tally.watch(total, progress.step)
            if bad is None and not bool(total.isfinite()):
                raise self._non_finite(inputs, progress.step)
            self.accelerator.backward(total)
        except RuntimeError as error:
            raise explained(error, self.model) or error from error
        apply_(self.optimizers, bad)
        with torch.no_grad():
            self.tally.add(loss, self.task.batch_total(outputs, targets), count_of(inputs))
        progress.step += 1
        progress.steps_total += 1
        if progress.step % self.look_every == 0:
            self.look()

    def follow(self) -> None:
        """Let schedule, weight average and session take the step into account; the last of a search freezes bits."""
        if self.session is None:
            for scheduler in self._schedulers:
                scheduler.step()
            if self._average is not None:
                self._average.update(self.model)
            return
        self.session.step()
        if self.progress.stage == "search" and self.session.stage == "finetune":
            if self.config.optimizer.schedule == "per_stage":
                for optimizer in self.optimizers:
                    optimizer.state.clear()
            self._begin("finetune")

    def look(self) -> None:
        """Bring the sums of :class:`Progress` up to date.

        Raises:
            NonFiniteError: if a loss was not finite since the last look, naming the layer.
            DistributedError: if that was the case in another process only.
        """
        first_bad = float(self.tally.bad_step)
        if first_bad < float(self.tally.own_bad_step):
            raise DistributedError(
                f"expected finite losses in all processes {self._place(int(first_bad))}, found NaN or infinity in "
                "another process than this one. Its output names the layer."
            )
        if first_bad < math.inf:
            raise self._repeated(int(first_bad))
        self.progress.sums = self.tally.look()

    def gather(self) -> None:
        """Bring the sums of :class:`Progress` up to date with the steps of all processes."""
        with all_or_none("training"):
            self.look()
        self.progress.sums = self.tally.gather()

    def close_epoch(self) -> None:
        """Go on to the next epoch, whose sums start at zero."""
        self.progress.epoch, self.progress.step, self.progress.sums = self.progress.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.tally = Tally(self.device)

    def batches(self) -> Iterator[Batch]:
        """The rest of the present epoch's training batches."""
        return self.train.epoch(self._data_key(), self.progress.step)

    def validate(self) -> dict[str, float] | None:
        """Score the model, or its weight average, on the held-out samples."""
        if self.data.validation is None:
            return None
        if self.session is not None:
            averaged: Any = self.session.averaged()
        else:
            averaged = nullcontext() if self._average is None else self._average.swapped(self.model)
        with averaged:
            return self._scored(self.data.validation)

    def _repeated(self, step: int) -> NonFiniteError:
        """The error for a step of this epoch that has passed: parameters are still what they were before it."""
        inputs, _ = next(self.train.epoch(self._data_key(), step))
        self._seed_step(step)
        return self._non_finite(moved(inputs, self.device, channels_last=self.config.channels_last), step)

    def _non_finite(self, inputs: Nested, step: int) -> NonFiniteError:
        part_(self.model, self.accelerator)  # this process runs the model once more, without the others
        return non_finite_loss(self.model, inputs, self._place(step), rerun=not self.is_sharded)

    # ------------------------------------------------------------------ from stage to stage

    def advance(self) -> None:
        """Close the float stage and build the session, or finish the session."""
        if self.progress.stage == "float":
            self.close_float()
            self._begin("search")
            self._enter(None)
            return
        assert self.session is not None
        self.session.finish()
        self._leave()
        self._begin("done")
        self._enter(None)

    def close_float(self) -> None:
        """End the float stage: the weight average becomes the model, which is whole again."""
        if self._average is not None:
            self._average.copy_to_(self.model)
            self._average = None
        self._leave()

    def _begin(self, stage: str) -> None:
        self.progress.stage, self.progress.epoch, self.progress.step = stage, 0, 0

    def _enter(self, checkpoint: Checkpoint | None) -> None:
        """Build the optimizers, and the float stage's average or the session, that the present stage trains with."""
        self.session, self.network, self._average = None, self.model, None
        self.optimizers, self._schedulers = [], []
        self.tally = Tally(self.device, self.progress.sums)
        if self.progress.stage == "float" and self.epochs:
            self._enter_float(checkpoint)
        elif self.progress.stage in ("search", "finetune"):
            self._enter_session(checkpoint)

    def _enter_float(self, checkpoint: Checkpoint | None) -> None:
        self._join()
        self.optimizers = make_optimizers(self.model, self.config.optimizer, prepared=False)
        steps = len(self.train)
        self._schedulers = schedulers(schedule_of(self.config, ["float"], steps), self.optimizers, self.epochs * steps)
        if self.config.ema_decay is not None:
            self._average = WeightAverage(self.model, self.config.ema_decay)
        if checkpoint is not None:
            assert checkpoint.optimizers is not None
            load_states_(self.optimizers, checkpoint.optimizers)
            resume_(self._schedulers, self.progress.epoch * steps + self.progress.step)
            if self._average is not None and checkpoint.average is not None:
                self._average.load_state_dict(checkpoint.average)

    def _enter_session(self, checkpoint: Checkpoint | None) -> None:
        config, stages, steps = self.config, self.config.stages, len(self.train)
        total = (stages.search.epochs + stages.finetune.epochs) * steps
        loader = _SessionLoader(self)
        seed = seed_of(config.seed, "allocation")
        allocation = None if config.allocation == "middle" else config.allocation
        if checkpoint is None:
            self._record("float")
            self.prepare()
            with self.accelerator.autocast() if allocation in ("noise", "sensitivity") else nullcontext():
                # Before the model is wrapped or sharded, and bits that it freezes are in an optimizer.
                calibrate_and_allocate_(
                    self.model, loader, self.budget, loader.loss, allocation=allocation,
                    calibration_batches=config.calibration_batches, seed=seed,
                )  # fmt: skip
        if total:
            self._join()
            self.optimizers = make_optimizers(self.model, config.optimizer, prepared=True)
        self.session = QATSession(
            self.network, self.budget, total, loader=loader, loss_fn=loader.loss, optimizer=self.optimizers,
            finetune=stages.finetune.epochs * steps / total if total else 0.0,
            schedule=schedule_of(config, ["search", "finetune"], steps), allocation=allocation,
            batchnorm_batches=config.batchnorm_batches, finetune_phase=stages.finetune.phase,
            noise_mix=config.noise_mix, penalty=config.penalty, ema_decay=config.ema_decay,
            oscillation=None if config.oscillation is None else config.oscillation.model_dump(), seed=seed,
            on_state=partial(self._record_session, resumed=checkpoint is not None),
        )  # fmt: skip
        if checkpoint is not None and checkpoint.session is not None:
            load_states_(self.optimizers, checkpoint.optimizers or [])
            self.session.load_state_dict(checkpoint.session)
        self.progress.stage = self.session.stage

    def _join(self) -> None:
        self.model.train()
        self.is_sharded = is_distributed() and self.config.parallel.strategy == "fsdp"
        self.network = join_(self.model, self.config.parallel, self.accelerator)

    def _leave(self) -> None:
        """Take the wrappers off; a sharded model is put together again, on every rank."""
        part_(self.model, self.accelerator)
        if self.is_sharded:
            state = whole_state(self.model)
            self.model = build_model(self.config.model, with_weights=False)
            self._place_model()
            self._load_model(state)
            self.is_sharded = False
        self.network = self.model

    # ------------------------------------------------------------------ scores

    def _record_session(self, name: str, *, resumed: bool) -> None:
        """Score a state that the session tells of, but not again those that it is in when a run is resumed."""
        if name != "calibrated" and not (resumed and self.session is None):
            self._record(name)

    def _record(self, name: str) -> None:
        """Score a finished state on held-out and test samples. The only place that reads the test targets."""
        check_state(self.model, f"in the {name} model")
        started = time.perf_counter()
        splits: dict[str, Split | None] = {"validation": self.data.validation, "test": self.data.test}
        scores = {key: self._scored(split) for key, split in splits.items() if split is not None}
        self.progress.states[name] = scores
        self.progress.seconds += time.perf_counter() - started

    def _scored(self, split: Split) -> dict[str, float]:
        """Score the model; of several processes the first does, unless each holds a part of the model only."""
        if self.is_sharded:
            return self.task.scores(self.model, split)
        return from_rank_zero(lambda: self.task.scores(self.model, split))

    # ------------------------------------------------------------------ saving and loading

    def checkpoint(self) -> Checkpoint:
        """All of the run at this moment.

        Raises:
            NonFiniteError: if the model holds a number that is not finite; such a state must not replace a good one.
        """
        with all_or_none("checkpoint"):
            check_state(self.model, self._place(self.progress.step))
        return Checkpoint(
            self.progress,
            self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers] or None,
            average=None if self._average is None else self._average.state_dict(),
            session=None if self.session is None else self.session.state_dict(),
        )

    def _load_model(self, state: dict[str, Tensor]) -> None:
        if self.progress.stage != "float":
            self.prepare()
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"the checkpoint does not fit the model of this config: {error}; use the run's own"
            ) from error
        own = self.model.state_dict()
        for key in (*state, *own):  # a prepared layer takes a float one's weight, and would keep ranges of its own
            if (key in state) != (key in own):
                raise ConfigError(
                    f"the checkpoint does not fit the model of this config: expected the same tensors in both, found "
                    f"{key} in the {'checkpoint' if key in state else 'model'} alone; use the run's own and the nipq "
                    "release that wrote it"
                )

    # ------------------------------------------------------------------ small parts

    def prepare(self) -> None:
        """Attach quantizers to the model."""
        prepare_(self.model, moved(self.example, self.device), self.config.quantization)

    def _objective(self) -> Objective:
        teacher = self.config.teacher
        if teacher is None:
            return Objective(self.task)
        network: nn.Module = build_model(teacher).to(self.device).eval().requires_grad_(False)
        return Objective(self.task, network, teacher.weight)

    def _place_model(self) -> None:
        self.model.to(self.device)
        if self.config.channels_last:
            self.model.to(memory_format=torch.channels_last)

    def _data_key(self) -> int:
        return seed_of(self.config.seed, "data", self.progress.stage, self.progress.epoch)

    def _seed_step(self, step: int) -> None:
        """Seed the noise of a step of the present epoch, on each rank anew."""
        torch.manual_seed(rank_seed(seed_of(self.config.seed, self.progress.stage, self.progress.epoch, step)))

    def _place(self, step: int) -> str:
        return f"in stage {self.progress.stage}, epoch {self.progress.epoch + 1}, step {step + 1}"


class _SessionLoader:
    """Training batches for calibration, allocation and batch norms: the same every time, on the device.

    Args:
        trainer: the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.device, self.channels_last = trainer.device, trainer.config.channels_last
        self.objective = trainer.objective
        self.batches = Few(trainer.train, len(trainer.train), seed_of(trainer.config.seed, "calibration"))
        # Curvature is that of the task's loss alone, which has to be twice differentiable.
        self.is_plain = trainer.config.allocation == "hawq"
        self.loss = self.objective.task.loss if self.is_plain else self.objective

    def __iter__(self) -> Iterator[Batch]:
        """Inputs, and all that outputs are compared with."""
        for inputs, targets in self.batches:
            inputs = moved(inputs, self.device, channels_last=self.channels_last)
            targets = moved(targets, self.device)
            yield inputs, targets if self.is_plain else self.objective.expected(inputs, targets)
