"""What the integrations add to a training step: each trainer with nipq's integration, and with the search by hand.

python -m benchmarks.integrations

"By hand" is the least that anybody would write: ``Search.penalty()`` in the loss, ``Search.step()`` after the step.
Both run the same prepared network in the same trainer, so their ratio is what the integration costs.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import accelerate
import pytorch_lightning as pl
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import nipq
from benchmarks import record
from benchmarks.timing import on_threads, quartiles, ratio, rotated
from nipq.integrations.accelerate import AcceleratedCourse
from nipq.integrations.lightning import NipqCallback
from nipq.integrations.transformers import quantize

BUDGET = nipq.AverageBits(weights=4, activations=4)
COURSE = {"finetune": 0.0, "batchnorm_batches": 0}
TRAINERS = ("plain loop", "Lightning", "transformers", "Accelerate")
#: Steps that are not counted at the start, and the last one, in which bits are frozen.
WARM = 5


class Task(nn.Module):
    """A prepared network with its loss, and the CPU time at which each training step began."""

    def __init__(self, network: nn.Module, side: int, batch: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = network
        x, y = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
        nipq.prepare_(self.network, x[:1])
        nipq.calibrate_(self.network, [x])
        self.rows = [{"x": image, "labels": int(label)} for image, label in zip(x, y, strict=True)]
        self.began: list[float] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What transformers' Trainer wants."""
        self.began.append(time.process_time())
        return {"loss": cross_entropy(self.network(x), labels)}

    def optimizer(self) -> torch.optim.Optimizer:
        """A rate so low that nothing changes."""
        return torch.optim.AdamW(nipq.param_groups(self, lr=1e-6))

    def loader(self, steps: int) -> DataLoader[Any]:
        """The same batch so many times."""
        return DataLoader(self.rows * steps, batch_size=len(self.rows))

    def search(self, steps: int) -> nipq.Search:
        """By hand."""
        return nipq.Search(self, BUDGET, steps)

    def seconds(self) -> float:
        """The shortest step: what others on the machine do to its caches only ever adds."""
        return min(after - before for before, after in pairwise(self.began[WARM:]))


def least() -> Task:
    """Next to nothing: what is left are trainer, search and integration."""
    return Task(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 10)), side=2, batch=4)


def small() -> Task:
    """Two convolutions on pictures of 8x8: a step of a few milliseconds, where overhead shows."""
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return Task(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), side=8, batch=64)


#: Build, what the page calls it, counted steps of a sample.
NETWORKS: dict[str, tuple[Callable[[], Task], str, int]] = {
    "least": (least, "two linear layers of a few numbers", 400),
    "small": (small, "two convolutions, 64 x 3 x 8 x 8", 60),
}


# ---------------------------------------------------------------------- one training run each


def plain_loop(task: Task, steps: int, ours: bool) -> None:
    """Nobody's trainer; ours is ``nipq.Course``."""
    optimizer = task.optimizer()
    guide = nipq.Course(task, BUDGET, steps, optimizer=optimizer, **COURSE) if ours else task.search(steps)
    for batch in task.loader(steps):
        loss = task(**batch)["loss"] + guide.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guide.step()


class Lit(pl.LightningModule):
    """The task, and the search by hand where it is given."""

    def __init__(self, task: Task, search: nipq.Search | None) -> None:
        super().__init__()
        self.task, self.search = task, search

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, with its penalty when by hand."""
        loss = self.task(**batch)["loss"]
        return loss if self.search is None else loss + self.search.penalty()

    def on_train_batch_end(self, *_: object) -> None:
        """The search's step when by hand."""
        if self.search is not None:
            self.search.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's."""
        return self.task.optimizer()


def lightning(task: Task, steps: int, ours: bool) -> None:
    """Ours is the callback."""
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[NipqCallback(BUDGET, total_steps=steps, **COURSE)] if ours else [],
    )  # fmt: skip
    trainer.fit(Lit(task, None if ours else task.search(steps)), task.loader(steps))


class ByHand(transformers.Trainer):
    """The search where a subclass would put it."""

    search: nipq.Search

    def compute_loss(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """The loss with its penalty."""
        return super().compute_loss(*args, **kwargs) + self.search.penalty()


class Steps(transformers.TrainerCallback):
    """And its step."""

    def __init__(self, search: nipq.Search) -> None:
        self.search = search

    def on_step_end(self, *_: object, **__: object) -> None:
        """The search's."""
        self.search.step()


def hugging_face(task: Task, steps: int, ours: bool) -> None:
    """Ours is ``quantize``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, max_steps=steps, per_device_train_batch_size=len(task.rows), report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        kind = transformers.Trainer if ours else ByHand
        trainer = kind(task, arguments, train_dataset=task.rows * steps, optimizers=(task.optimizer(), None))
        if ours:
            quantize(trainer, BUDGET, **COURSE)
        else:
            trainer.search = task.search(steps)
            trainer.add_callback(Steps(trainer.search))
        trainer.train()


def accelerated(task: Task, steps: int, ours: bool) -> None:
    """Ours is ``AcceleratedCourse``."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(task, task.optimizer(), task.loader(steps))
    guide = (
        AcceleratedCourse(accelerator, model, BUDGET, steps, optimizer=optimizer, **COURSE)
        if ours
        else task.search(steps)
    )
    for batch in loader:
        accelerator.backward(model(**batch)["loss"] + guide.penalty())
        optimizer.step()
        optimizer.zero_grad()
        guide.step()


RUNS: dict[str, Callable[[Task, int, bool], None]] = dict(
    zip(TRAINERS, (plain_loop, lightning, hugging_face, accelerated), strict=True)
)


# ---------------------------------------------------------------------- measuring


def measure(name: str, rounds: int) -> dict[str, Any]:
    """All trainers in turn, with and without the integration next to each other; round after round."""
    build, shown, steps = NETWORKS[name]
    pairs = [(trainer, ours) for trainer in TRAINERS for ours in (False, True)]
    found: dict[tuple[str, bool], list[float]] = {pair: [] for pair in pairs}
    with on_threads(1):
        for place in range(-1, rounds):  # the first only warms up
            for trainer in rotated(TRAINERS, max(place, 0)):
                for ours in (False, True) if place % 2 else (True, False):
                    task = build().train()
                    RUNS[trainer](task, WARM + steps + 1, ours)
                    if place >= 0:
                        found[trainer, ours].append(task.seconds())
    rows = {
        trainer: {
            "ratio": ratio(found[trainer, True], found[trainer, False]).rounded(),
            "extra_microseconds": quartiles(
                [(a - b) * 1e6 for a, b in zip(found[trainer, True], found[trainer, False], strict=True)]
            ).rounded(),
            "trainer": ratio(found[trainer, False], found["plain loop", False]).rounded(),
        }
        for trainer in TRAINERS
    }
    by_hand = quartiles(found["plain loop", False]).times(1e3).rounded()
    return {"shown": shown, "steps": steps, "milliseconds": by_hand, "rows": rows}


def main() -> None:
    """Measure and write."""
    arguments = record.parser(__doc__, "integrations", 9).parse_args()
    record.refuse_existing(arguments.out, overwrite=arguments.overwrite)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    content = record.origin(record.load()) | {"rounds": arguments.rounds}
    for package in ("pytorch-lightning", "transformers", "accelerate"):
        content["versions"][package] = version(package)
    content["networks"] = {name: measure(name, arguments.rounds) for name in NETWORKS}
    record.write(arguments.out, content)


if __name__ == "__main__":
    main()
