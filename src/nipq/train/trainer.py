"""One run in memory: its model, its data, and the steps from a float model to a frozen one.

The stages are ``float``, ``search`` (the method's estimator; bits learned, or allocated before), ``finetune`` (bits
frozen, true quantizer or again the method's) and ``done``. :meth:`Trainer.advance` closes one and opens the next. All
randomness follows from the config's seed and the place in the run, so a run that continues from a checkpoint draws the
same numbers. Of several processes each trains on a slice of every batch, and the noise differs between them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nipq.distributed import all_or_none, check_same_, is_distributed, rank_seed
from nipq.errors import ConfigError, DistributedError, NonFiniteError
from nipq.prepare.batches import call_model
from nipq.prepare.prepare import prepare_
from nipq.train.batches import Split
from nipq.train.checkpoint import Checkpoint, Progress, whole_state
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task
from nipq.train.guard import check_state, non_finite_loss
from nipq.train.nested import Nested, count_of, moved, pick
from nipq.train.objective import Objective
from nipq.train.parallel import explained, join_, part_, pick_device, share
from nipq.train.passage import LEAVE, scored
from nipq.train.preflight import make_budget, preflight
from nipq.train.seeds import seed_of
from nipq.train.stage import Stage, enter_phase_, stage_config
from nipq.train.tally import Tally

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

NEXT = {"float": "search", "search": "finetune", "finetune": "done"}
LOOK_EVERY = {"cuda": 50}
"""On a GPU, reading a number waits for all that it was asked to do, so losses are looked at once in so many steps."""


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
        self.train: Split = share(self.data.train, config.data.batch_size)
        self.task = build_task(config)
        self.example = pick(next(iter(self.data.test))[0], slice(1))
        self.seed("model")
        self.model = build_model(config.model, with_weights=checkpoint is None)
        self.feasible = (
            preflight(self.model, self.example, config, self.budget, partial(self.task.check, data=self.data))
            if checkpoint is None
            else []
        )
        if checkpoint is None:
            check_same_(self.model, "nipq train")
        self._place_model()
        self.objective = self._objective()
        self.progress = Progress() if checkpoint is None else checkpoint.progress
        self.stage: Stage | None = None
        self.is_sharded = False
        self.look_every = LOOK_EVERY.get(self.device.type, 1)
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

        On a GPU they are brought up to date, and losses that are not finite are noticed, once in ``LOOK_EVERY``
        steps; after such a loss, in whichever process, no step changes a parameter.

        Args:
            inputs: Of the model.
            targets: What the task compares its outputs with.

        Raises:
            NonFiniteError: If a loss is not finite, naming the layer.
            DistributedError: If another process is gone.
        """
        assert self.stage is not None
        progress = self.progress
        torch.manual_seed(rank_seed(seed_of(self.config.seed, progress.stage, progress.epoch, progress.step)))
        self.stage.begin(progress.epoch, progress.step)
        inputs = moved(inputs, self.device, channels_last=self.config.channels_last)
        targets = moved(targets, self.device)
        try:
            outputs, loss, total = self._forward(inputs, targets)
            bad = None if self.look_every == 1 else self.tally.watch(total, progress.step)
            if bad is None and not bool(total.isfinite()):
                raise self._non_finite(inputs, progress.step)
            total.backward()  # type: ignore[no-untyped-call]  # torch gives it no type
        except RuntimeError as error:
            raise explained(error, self.model) or error from error
        self.stage.end(bad)
        with torch.no_grad():
            self.tally.add(loss, self.task.batch_total(outputs, targets), count_of(inputs))
        progress.step += 1
        progress.steps_total += 1
        if progress.step % self.look_every == 0:
            self.look()

    def look(self) -> None:
        """Bring the sums of :class:`Progress` up to date.

        Raises:
            NonFiniteError: If a loss was not finite since the last look, naming the layer.
            DistributedError: If that was the case in another process only.
        """
        first_bad = float(self.tally.bad_step)
        if first_bad < float(self.tally.own_bad_step):
            raise DistributedError(
                f"expected finite losses in all processes {self._place(int(first_bad))}, found NaN or infinity in "
                "another process than this one. Its output names the layer."
            )
        if first_bad < float("inf"):
            raise self._repeated(int(first_bad))
        self.progress.sums = self.tally.look()

    def gather(self) -> None:
        """Bring the sums of :class:`Progress` up to date with the steps of all processes."""
        with all_or_none("training"):
            self.look()
        self.progress.sums = self.tally.gather()

    def begin_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self.tally = Tally(self.device, self.progress.sums)

    def autocast(self) -> torch.autocast:
        """The precision in which losses that train the model are computed."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == "bf16")

    def _forward(self, inputs: Nested, targets: Nested | None) -> tuple[Any, Tensor, Tensor]:
        """Outputs, loss, and loss with penalties."""
        assert self.stage is not None
        with self.autocast():
            outputs = call_model(self.network, inputs)
            loss = self.objective(outputs, inputs, targets)
        return outputs, loss, self.stage.penalty(loss)

    def _repeated(self, step: int) -> NonFiniteError:
        """The error for a step of this epoch that has passed: parameters are still what they were before it."""
        inputs, _ = next(self.train.epoch(self._data_key(), step))
        torch.manual_seed(rank_seed(seed_of(self.config.seed, self.progress.stage, self.progress.epoch, step)))
        return self._non_finite(moved(inputs, self.device, channels_last=self.config.channels_last), step)

    def _non_finite(self, inputs: Nested, step: int) -> NonFiniteError:
        part_(self.model)  # this process runs the model once more, without the others
        return non_finite_loss(self.model, inputs, self._place(step), rerun=not self.is_sharded)

    def validate(self) -> dict[str, float] | None:
        """Score the model, or its weight average, on the held-out samples."""
        if self.data.validation is None:
            return None
        if self.stage is None or self.stage.average is None:
            return scored(self, self.data.validation)
        with self.stage.average.swapped(self.model):
            return scored(self, self.data.validation)

    def batches(self) -> Any:  # noqa: ANN401 - an iterator of batches
        """The rest of the present epoch's training batches."""
        return self.train.epoch(self._data_key(), self.progress.step)

    # ------------------------------------------------------------------ from stage to stage

    def settle(self) -> None:
        """At the end of a stage the weight average, where there is one, becomes the model."""
        if self.stage is not None:
            self.stage.settle()
        part_(self.model)
        self._make_whole()
        self.network = self.model

    def advance(self) -> None:
        """Close the present, settled stage, score what it left, and open the next."""
        LEAVE[self.progress.stage](self)
        self.progress.stage = NEXT[self.progress.stage]
        self.progress.epoch = self.progress.step = 0
        self._enter()

    def _enter(self) -> None:
        """Build what the present stage trains with."""
        previous, self.stage = self.stage, None
        self.network = self.model
        self.begin_epoch()
        name = self.progress.stage
        if name != "float":
            enter_phase_(self.model, self.config, name)
        if self.epochs:
            self.model.train()
            self.is_sharded = is_distributed() and self.config.parallel.strategy == "fsdp"
            self.network = join_(self.model, self.config.parallel)
            self.stage = Stage(name, self.model, self.config, self.budget, len(self.data.train), previous)

    # ------------------------------------------------------------------ saving and loading

    def checkpoint(self) -> Checkpoint:
        """All of the run at this moment.

        Raises:
            NonFiniteError: If the model holds a number that is not finite; such a state must not replace a good one.
        """
        with all_or_none("checkpoint"):
            check_state(self.model, self._place(self.progress.step))
        checkpoint = Checkpoint(self.progress, self.model.state_dict())
        if self.stage is not None:
            self.stage.save(checkpoint)
        return checkpoint

    def _make_whole(self) -> None:
        """Put a sharded model together again, on every rank."""
        if self.is_sharded:
            state = whole_state(self.model)
            self.model = build_model(self.config.model, with_weights=False)
            self._place_model()
            self._load_model(state)
            self.is_sharded = False

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
        for key in (*state, *own):  # a prepared layer takes a float one's weight, and would keep boundaries of its own
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

    def seed(self, *what: int | str) -> None:
        """Start torch's generators for a purpose, alike in all processes."""
        torch.manual_seed(seed_of(self.config.seed, *what))

    def _place(self, step: int) -> str:
        return f"in stage {self.progress.stage}, epoch {self.progress.epoch + 1}, step {step + 1}"
