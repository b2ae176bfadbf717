"""Overhead of the integrations in a training step: each trainer with nipq's integration, and with the search by hand.

python -m benchmarks.integrations

"By hand" is the least that anybody would write: ``Search.penalty()`` in the loss, ``Search.step()`` after the step.
Both train the same prepared network in the same trainer, and take turns of a few steps: their difference is what the
integration costs. It is measured on a network that has next to nothing to do: two copies of a larger one differ by
more, through their places in memory. The step that it is set against is that of a small one.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
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
from benchmarks.timing import median_interval, on_threads, quartiles
from benchmarks.turns import Turns
from nipq.integrations.accelerate import AcceleratedSession
from nipq.integrations.lightning import NipqCallback
from nipq.integrations.transformers import quantize
from nipq.qat.search import Search

BUDGET = nipq.AverageBits(weights=4, activations=4)
SESSION = {"finetune": 0.0, "batchnorm_batches": 0}
TRAINERS = ("plain loop", "Lightning", "transformers", "Accelerate")
#: Steps of a turn, and turns of a round that count. The first does not, nor the last step, in which bits are frozen.
BLOCK, BLOCKS = 5, 12
STEPS = BLOCK * (BLOCKS + 1) + 1


class Task(nn.Module):
    """A prepared network with its loss, which waits for its turn at each step."""

    def __init__(self, network: nn.Module, side: int, batch: int, turns: Turns) -> None:
        super().__init__()
        self._turns = turns
        torch.manual_seed(0)
        self.network = network
        x, y = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
        nipq.prepare_(self.network, x[:1])
        nipq.calibrate_(self.network, [x])
        self.rows = [{"x": image, "labels": int(label)} for image, label in zip(x, y, strict=True)]

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss in a dictionary, as transformers' Trainer expects."""
        self._turns.step()
        return {"loss": cross_entropy(self.network(x), labels)}

    def optimizer(self) -> torch.optim.Optimizer:
        """A rate so low that nothing changes."""
        return torch.optim.AdamW(nipq.param_groups(self, lr=1e-6))

    def loader(self) -> DataLoader[Any]:
        """The same batch at every step."""
        return DataLoader(self.rows * STEPS, batch_size=len(self.rows))

    def search(self) -> Search:
        """By hand."""
        return Search(self, BUDGET, STEPS)


def least(turns: Turns) -> Task:
    """Next to nothing: what is left are trainer, search and integration."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 10))
    return Task(network, side=2, batch=4, turns=turns)


def small(turns: Turns) -> Task:
    """Two convolutions on pictures of 8x8: a step of a few milliseconds, where overhead shows."""
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return Task(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), side=8, batch=64, turns=turns)


# ---------------------------------------------------------------------- one training run each


def plain_loop(task: Task, ours: bool) -> None:
    """Nobody's trainer; ours is ``nipq.QATSession``."""
    optimizer = task.optimizer()
    guide = nipq.QATSession(task, BUDGET, STEPS, optimizer=optimizer, **SESSION) if ours else task.search()
    for batch in task.loader():
        loss = task(**batch)["loss"] + guide.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guide.step()


class Lit(pl.LightningModule):
    """The task, and the search by hand where it is given."""

    def __init__(self, task: Task, search: Search | None) -> None:
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


def lightning(task: Task, ours: bool) -> None:
    """Ours is the callback."""
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[NipqCallback(BUDGET, total_steps=STEPS, **SESSION)] if ours else [],
    )  # fmt: skip
    trainer.fit(Lit(task, None if ours else task.search()), task.loader())


class ByHand(transformers.Trainer):
    """The search where a subclass would put it."""

    search: Search

    def compute_loss(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """The loss with its penalty."""
        return super().compute_loss(*args, **kwargs) + self.search.penalty()


class Steps(transformers.TrainerCallback):
    """And its step."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_step_end(self, *_: object, **__: object) -> None:
        """The search's."""
        self.search.step()


def hugging_face(task: Task, ours: bool) -> None:
    """Ours is ``quantize``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=len(task.rows), report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        kind = transformers.Trainer if ours else ByHand
        trainer = kind(task, arguments, train_dataset=task.rows * STEPS, optimizers=(task.optimizer(), None))
        if ours:
            quantize(trainer, BUDGET, **SESSION)
        else:
            trainer.search = task.search()
            trainer.add_callback(Steps(trainer.search))
        trainer.train()


def accelerated(task: Task, ours: bool) -> None:
    """Ours is ``AcceleratedSession``."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(task, task.optimizer(), task.loader())
    guide = (
        AcceleratedSession(accelerator, model, BUDGET, STEPS, optimizer=optimizer, **SESSION) if ours else task.search()
    )
    for batch in loader:
        accelerator.backward(model(**batch)["loss"] + guide.penalty())
        optimizer.step()
        optimizer.zero_grad()
        guide.step()


RUNS: dict[str, Callable[[Task, bool], None]] = dict(
    zip(TRAINERS, (plain_loop, lightning, hugging_face, accelerated), strict=True)
)


# ---------------------------------------------------------------------- measuring


def overheads(rounds: int) -> dict[str, Any]:
    """All trainers in turn, each with and without its integration side by side; round after round."""
    found: dict[str, list[tuple[float, float]]] = {trainer: [] for trainer in TRAINERS}
    for place in range(-1, rounds):  # the first only warms up
        for trainer in TRAINERS:
            pair = _pair(least, RUNS[trainer], ours_first=bool(place % 2))
            if place >= 0:
                found[trainer].append(pair)
    return {
        trainer: {
            "extra_microseconds": median_interval([extra * 1e6 for _, extra in pairs]).rounded(),
            "milliseconds": quartiles([by_hand * 1e3 for by_hand, _ in pairs]).rounded(),
        }
        for trainer, pairs in found.items()
    }


def small_step(rounds: int) -> list[float]:
    """Milliseconds of a step of the small network in the plain loop by hand."""
    pairs = [_pair(small, plain_loop, ours_first=bool(place % 2)) for place in range(rounds)]
    return quartiles([by_hand * 1e3 for by_hand, _ in pairs]).rounded()


def _pair(build: Callable[[Turns], Task], run: Callable[[Task, bool], None], ours_first: bool) -> tuple[float, float]:
    """Seconds of a step by hand, and what the integration adds to it: medians over the turns of one run of both."""
    turns, order = Turns(BLOCK), (ours_first, not ours_first)
    tasks = [build(turns).train() for _ in order]
    blocks = dict(zip(order, turns.run([partial(run, *pair) for pair in zip(tasks, order, strict=True)]), strict=True))
    ours, by_hand = (blocks[kind][1:] for kind in (True, False))
    gc.collect()
    extra = statistics.median(a - b for a, b in zip(ours, by_hand, strict=True))
    return statistics.median(by_hand) / BLOCK, extra / BLOCK


def main() -> None:
    """Measure and write."""
    arguments = record.parser(__doc__, "integrations", 41).parse_args()
    record.refuse_existing(arguments.out, overwrite=arguments.overwrite)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    content = record.origin(record.load()) | {"rounds": arguments.rounds}
    for package in ("pytorch-lightning", "transformers", "accelerate"):
        content["versions"][package] = version(package)
    with on_threads(1):
        content |= {"steps": BLOCK * BLOCKS, "rows": overheads(arguments.rounds), "small_step": small_step(9)}
    record.write(arguments.out, content)


if __name__ == "__main__":
    main()
