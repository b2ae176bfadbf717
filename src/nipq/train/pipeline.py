"""``run``: from a config to a folder with a proven mixed-precision model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from nipq.budget.budget import costs
from nipq.distributed import from_rank_zero, rank
from nipq.report.summary import summary
from nipq.train.checkpoint import Checkpoint
from nipq.train.finish import finish
from nipq.train.parallel import process_group
from nipq.train.reporter import Reporter
from nipq.train.run_folder import RunFolder, write_state
from nipq.train.trainer import Trainer

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

TITLES = {"float": "float", "search": "search", "finetune": "fine-tune"}
BITS_EVERY = 10
"""Steps between two looks at the bits for the progress bar, at least; each look reads every quantizer."""


def run(config: TrainConfig, folder: str | Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, search, freeze, fine-tune, convert, save and verify, as the config says.

    Killed at any moment and called again with ``resume``, it ends with the same numbers. Started by ``torchrun`` or
    ``accelerate launch`` in several processes, they share every batch, and the first one writes and returns for all.

    Args:
        config: What to do; see :class:`~nipq.train.config.TrainConfig`.
        folder: Where everything is written; new or empty unless ``resume``.
        resume: Continue the run in ``folder``; a finished run gives its results again, an empty folder starts afresh.
        quiet: Show nothing on the terminal.

    Returns:
        The results, as in ``results.json``: scores of each named state (``float``, ``frozen``, ``bn``,
        ``finetuned``), bits, bytes, budget and the outcome of ``verify``.

    Raises:
        ConfigError: If the folder holds another run, or config, data and model do not fit each other.
        BudgetError: If the budget is out of reach.
        NonFiniteError: If a loss or boundary stops being finite; the last checkpoint stays.
        FileFormatError: If a checkpoint cannot be read.
        DistributedError: If another process is gone, or holds another model.
    """
    with _threads(config.threads), process_group(config):
        return _run(config, RunFolder(folder), resume=resume, quiet=quiet)


def _run(config: TrainConfig, place: RunFolder, *, resume: bool, quiet: bool) -> dict[str, Any]:
    opened = from_rank_zero(lambda: _opened(config, place, resume=resume))
    if isinstance(opened, dict):
        return opened
    trainer = Trainer(config, opened)
    first = rank() == 0
    if opened is None and first and not place.holds_run():
        place.start(config)
    board = place.tensorboard if first else None
    with Reporter(board, trainer.progress.steps_total, quiet=quiet or not first) as reporter:
        for found in trainer.feasible:
            reporter.say(f"budget: {found}")
        while trainer.progress.stage != "done":
            while trainer.progress.epoch < trainer.epochs:
                _epoch(trainer, place, reporter)
            trainer.settle()
            if trainer.progress.stage == "float" and first:
                write_state(place.float, trainer.model.state_dict())
            trainer.advance()
            trainer.checkpoint().save(place.checkpoint)
        return from_rank_zero(lambda: finish(trainer, place, reporter))


def _opened(config: TrainConfig, place: RunFolder, *, resume: bool) -> dict[str, Any] | Checkpoint | None:
    """The results of a finished run, where to continue one, or ``None`` to start."""
    if not (resume and place.holds_run()):
        place.check_free()
        return None
    place.check_same(config)
    if place.results.is_file():
        results: dict[str, Any] = json.loads(place.results.read_text(encoding="utf-8"))
        return results
    checkpoint = Checkpoint.load(place.checkpoint) if place.checkpoint.is_file() else None
    place.truncate_rows(0 if checkpoint is None else checkpoint.progress.rows)
    return checkpoint


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with so many CPU threads; torch's setting is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _epoch(trainer: Trainer, place: RunFolder, reporter: Reporter) -> None:
    """One training epoch, or the rest of one, then its row and its checkpoint."""
    progress, metric, started = trainer.progress, trainer.task.metric, time.perf_counter()
    assert trainer.stage is not None
    total, stage, every = len(trainer.train), trainer.stage, trainer.config.checkpoint_every
    reporter.begin_epoch(f"{TITLES[progress.stage]} {progress.epoch + 1}/{trainer.epochs}", total, progress.step)
    bits: dict[str, float | None] = {}
    for inputs, targets in trainer.batches():
        trainer.step(inputs, targets)
        if stage.search is not None and progress.step % max(BITS_EVERY, trainer.look_every) == 1:
            bits = bits_now(trainer)
        reporter.step(_means(progress.sums, metric) | bits)
        if every and progress.step % every == 0 and progress.step < total:
            trainer.gather()
            progress.seconds, started = progress.seconds + time.perf_counter() - started, time.perf_counter()
            trainer.checkpoint().save(place.checkpoint)
    trainer.gather()
    row: dict[str, Any] = {
        "stage": progress.stage,
        "epoch": progress.epoch + 1,
        "step": progress.steps_total,
        "lr": trainer.config.optimizer.lr * stage.schedule.factor(progress.epoch, (total - 1) / total),
    }
    row |= {f"train_{name}": value for name, value in _means(progress.sums, metric).items()}
    scores = trainer.validate()
    if scores is not None:
        row |= {f"val_{name}": scores[name] for name in ("loss", metric)}
    if progress.stage != "float":
        row |= bits_now(trainer) | per_layer_bits(trainer)
    progress.seconds += time.perf_counter() - started
    row["seconds"] = progress.seconds
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, [0.0, 0.0, 0.0]
    progress.rows += 1
    trainer.begin_epoch()
    checkpoint = trainer.checkpoint()  # refuses a model that is not finite before anything is written
    if rank() == 0:
        place.append_row(row)
    checkpoint.save(place.checkpoint)
    scalars = {f"{progress.stage}/{key}": value for key, value in row.items() if isinstance(value, float)}
    reporter.scalars(scalars, progress.steps_total)
    reporter.say(_line(row, trainer.epochs, metric))


def bits_now(trainer: Trainer) -> dict[str, float | None]:
    """Average bits, whole as evaluation uses them, and how far above the budget they are (0.1: a tenth).

    Where oscillations are watched, also the mean share of weights that oscillate.
    """
    table, stage = summary(trainer.model), trainer.stage
    now: dict[str, float | None] = {"weight_bits": table.weight_bits, "activation_bits": table.activation_bits}
    if stage is not None and stage.search is not None:
        now["distance"] = max(limit["relative"] for limit in stage.search.distance().values())
    if stage is not None and stage.oscillations is not None:
        now["oscillating"] = fmean(stage.oscillations.frequency().values())
    return now


def per_layer_bits(trainer: Trainer) -> dict[str, Any]:
    """Learned (soft) bits of each layer as ``[weight, activation]``, and each limit with its present value."""
    layers = {row.name: [row.weight_bits_soft, row.activation_bits_soft] for row in summary(trainer.model).layers}
    limits = [] if trainer.budget is None else [value.to_dict() for value in costs(trainer.model, trainer.budget)]
    return {"layer_bits": layers, "limits": limits}


def _means(sums: list[float], metric: str) -> dict[str, float | None]:
    """Mean loss and metric of an epoch's steps so far; without the metric where the task has none of single batches."""
    loss, score, count = sums
    if not count:  # not looked at yet
        return {}
    means: dict[str, float | None] = {"loss": loss / count}
    return means if math.isnan(score) else means | {metric: score / count}


def _line(row: dict[str, Any], epochs: int, metric: str) -> str:
    shown = ("train_loss", f"train_{metric}", f"val_{metric}", "weight_bits", "activation_bits", "distance")
    numbers = {key: row[key] for key in shown if row.get(key) is not None}
    text = "  ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
    return f"{TITLES[row['stage']]} {row['epoch']}/{epochs}  {text}"
