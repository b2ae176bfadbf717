"""``nipq train``: from a config to a folder with a verified mixed-precision model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from nipq.budget.budget import costs
from nipq.config import Phase
from nipq.distributed import from_rank_zero, rank
from nipq.errors import ConfigError, FileFormatError, MissingDependencyError, require
from nipq.export.packed_read import load
from nipq.export.packed_write import file_bytes, save
from nipq.files import check_seal, json_text
from nipq.functional.clipping import even_stride
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import LayerRow, layer_table, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.report.summary import summary
from nipq.tables import WIDTH, fitting
from nipq.train.batches import Batch, Few, Nested, moved, pick
from nipq.train.checkpoint import Checkpoint
from nipq.train.checks import check_scores
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task, read_state
from nipq.train.parallel import accelerated
from nipq.train.plots import Histogram, plot_bits, plot_history, plot_ranges
from nipq.train.run_folder import RunFolder, write_state, write_table, write_text
from nipq.train.trainer import Trainer
from nipq.verify import VerifyResult, verify

if TYPE_CHECKING:
    from nipq.train.config import ModelConfig, TrainConfig
    from nipq.train.task import Task

#: Columns of the progress bar.
BAR = 10
#: Names of the stages on the terminal.
TITLES = {"float": "float", "search": "search", "finetune": "fine-tune"}
#: Steps between two looks at the bits for the progress bar, at least; each look reads every quantizer.
BITS_EVERY = 10
#: Layers whose weights and inputs are drawn against their clipping ranges, and elements drawn of each tensor.
PANELS, SAMPLE = 4, 50_000


def run(config: TrainConfig, folder: str | Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train, search, freeze, fine-tune, convert, save and verify, as the config says.

    Killed at any moment and called again with ``resume``, it ends with the same numbers. Started by ``torchrun`` or
    ``accelerate launch`` in several processes, they share every batch, and the first one writes and returns for all.

    Args:
        config: what to do; see :class:`~nipq.train.config.TrainConfig`.
        folder: where everything is written; new or empty unless ``resume``.
        resume: continue the run in ``folder``; a finished run gives its results again, an empty folder starts afresh.
        quiet: show nothing on the terminal.

    Returns:
        The results, as in ``results.json``: scores of each named state (``float``, ``frozen``, ``bn``,
        ``finetuned``), bits, bytes, budget and the outcome of ``verify``.

    Raises:
        ConfigError: if the folder holds another run, or config, data and model do not fit each other.
        BudgetError: if the budget is out of reach.
        NonFiniteError: if a loss or clipping range stops being finite; the last checkpoint stays.
        FileFormatError: if a checkpoint cannot be read.
        DistributedError: if another process is gone, or holds another model.
    """
    place = RunFolder(folder)
    with accelerated(config) as accelerator, _threads(config.threads), ExitStack() as stack:
        from_rank_zero(lambda: stack.enter_context(_claimed(place)))
        return _run(config, place, accelerator, resume=resume, quiet=quiet)


@contextmanager
def _claimed(place: RunFolder) -> Iterator[None]:
    """Hold the folder's lock; a folder that was made for it goes again if nothing was started in it.

    So a path that cannot be written is known before anything is trained.
    """
    made = not place.path.exists()
    try:
        with place.claimed():
            yield
    finally:
        if made and [found.name for found in place.path.iterdir()] == [place.lock.name]:
            place.lock.unlink()
            place.path.rmdir()


def _run(config: TrainConfig, place: RunFolder, accelerator: Any, *, resume: bool, quiet: bool) -> dict[str, Any]:  # noqa: ANN401
    opened = from_rank_zero(lambda: _opened(config, place, resume=resume))
    if isinstance(opened, dict):
        return opened
    trainer = Trainer(config, opened, accelerator)
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
            if trainer.progress.stage == "float":
                trainer.close_float()
                if first:
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
        results: dict[str, Any] = place.read(place.results, dict)
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
    progress, started, epochs = trainer.progress, time.perf_counter(), trainer.epochs
    total, every = len(trainer.train), trainer.config.checkpoint_every
    reporter.begin_epoch(f"{TITLES[progress.stage]} {progress.epoch + 1}/{epochs}", total, progress.step)
    bits: dict[str, float | None] = {}
    row: dict[str, Any] = {}
    for inputs, targets in trainer.batches():
        trainer.step(inputs, targets)
        if progress.stage == "search" and progress.step % max(BITS_EVERY, trainer.look_every) == 1:
            bits = bits_now(trainer)
        reporter.step(_means(progress.sums, trainer.task.metric) | bits)
        if progress.step == total:  # before the last step of a search freezes the bits that its row is about
            row = _row(trainer)
            progress.seconds += time.perf_counter() - started  # scores between stages are timed apart
            row["seconds"] = progress.seconds
            progress.rows += 1
            trainer.close_epoch()
        trainer.follow()
        if every and progress.step and progress.step % every == 0:
            trainer.gather()
            progress.seconds, started = progress.seconds + time.perf_counter() - started, time.perf_counter()
            trainer.checkpoint().save(place.checkpoint)
    checkpoint = trainer.checkpoint()  # refuses a model that is not finite before anything is written
    if rank() == 0:
        place.append_row(row)
    checkpoint.save(place.checkpoint)
    scalars = {f"{row['stage']}/{key}": value for key, value in row.items() if isinstance(value, float)}
    reporter.scalars(scalars, progress.steps_total)
    reporter.say(epoch_line(row, epochs, trainer.task.metric, trainer.task.unit))


def _row(trainer: Trainer) -> dict[str, Any]:
    """The row of an epoch whose last optimizer step was made, but for its time."""
    trainer.gather()
    progress, metric = trainer.progress, trainer.task.metric
    row: dict[str, Any] = {
        "stage": progress.stage,
        "epoch": progress.epoch + 1,
        "step": progress.steps_total,
        "lr": trainer.rate,
    }
    row |= {f"train_{name}": value for name, value in _means(progress.sums, metric).items()}
    scores = trainer.validate()
    if scores is not None:
        check_scores(scores, f"validation after {progress.stage} epoch {progress.epoch + 1}")
        row |= {f"val_{name}": scores[name] for name in ("loss", metric)}
    if trainer.session is not None:
        row |= bits_now(trainer) | per_layer_bits(trainer)
    return row


def bits_now(trainer: Trainer) -> dict[str, float | None]:
    """Average bits, whole as evaluation uses them, and how far above the budget they are (0.1: a tenth).

    Where oscillations are watched, also the mean share of weights that oscillate.
    """
    table, session = summary(trainer.model), trainer.session
    now: dict[str, float | None] = {"weight_bits": table.weight_bits, "activation_bits": table.activation_bits}
    if session is not None and session.search is not None:
        now["distance"] = max(limit["relative"] for limit in session.search.distance().values())
    if session is not None and session.oscillations is not None:
        now["oscillating"] = fmean(session.oscillations.frequency().values())
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


def epoch_line(row: dict[str, Any], epochs: int, metric: str, unit: str) -> str:
    """An epoch in one line of 80 columns at most; what does not fit is in the metrics file.

    Args:
        row: of the metrics file.
        epochs: of its stage.
        metric: name of the task's metric.
        unit: its unit.
    """
    bits = [f"{row[key]:.2f}" if row.get(key) else "float" for key in ("weight_bits", "activation_bits")]
    parts = [
        f"{TITLES[row['stage']]} {row['epoch']}/{epochs}",
        *_numbers(row, {"train_loss": "", f"val_{metric}": unit}),
        *([f"W/A bits {'/'.join(bits)}"] if "weight_bits" in row else []),
        *_numbers(row, {f"train_{metric}": unit, "distance": ""}),
    ]
    return fitting(parts, WIDTH)


def _numbers(values: Mapping[str, float | None], units: Mapping[str, str]) -> list[str]:
    """Those of the named numbers that are known, each with its name and unit."""
    return [
        f"{name.replace('_', ' ')} {value:.4g} {unit}".rstrip()
        for name, unit in units.items()
        if (value := values.get(name)) is not None
    ]


# ---------------------------------------------------------------------- the end of a run


def finish(trainer: Trainer, place: RunFolder, reporter: Reporter) -> dict[str, Any]:
    """Write everything that a finished run leaves; the results file comes last, so its presence means complete.

    Args:
        trainer: a run in stage ``done``.
        place: its folder.
        reporter: shows what is being done.

    Returns:
        The results, as in ``results.json``; see :func:`run`.
    """
    model = trainer.model.eval()
    table = summary(model)
    layers = table.to_dict()["layers"]
    write_text(place.layers_json, json_text(layers, indent=1) + "\n")
    write_table(place.layers_csv, layers)
    write_state(place.trained, model.state_dict())
    deployed = convert(model)
    save(deployed, place.model, overwrite=True)
    reporter.say(f"saved {place.model.name}, {file_bytes(deployed):,} bytes; verifying")
    batches = Few(trainer.data.test, trainer.config.verify_batches)
    outcome = verify(model, deployed, batches, file=place.model, metric=metric_of(trainer.task))
    write_text(place.verify, json_text(outcome.to_dict(), indent=1) + "\n")
    skipped = _plots(trainer, place, layers)
    if skipped:
        reporter.say(f"[yellow]no plots: {skipped}")
    results = {
        "model": trainer.config.model.factory,
        "seed": trainer.config.seed,
        "metric": trainer.task.to_dict(),
        "states": trainer.progress.states,
        "average_bits": {"weights": table.weight_bits, "activations": table.activation_bits},
        "limits": [] if trainer.budget is None else [value.to_dict() for value in costs(model, trainer.budget)],
        "bytes": {"file": place.model.stat().st_size, "float32": float_bytes(trainer.config.model)},
        "verified": bool(outcome),
        "steps": trainer.progress.steps_total,
        "seconds": trainer.progress.seconds,
    }
    write_text(place.results, json_text(results, indent=1) + "\n")
    return results


def verify_run(place: RunFolder, files: Sequence[Path] = ()) -> VerifyResult:
    """Load a finished run's trained and packed models from its folder and compare them again.

    Args:
        place: the run's folder.
        files: exports of the run, to be compared as well.

    Returns:
        The result of :func:`nipq.verify.verify`; true when every level holds.

    Raises:
        ConfigError: if the folder holds no finished run.
        FileFormatError: if a file of the run cannot be read.
    """
    config = place.read_config()
    for path in (place.trained, place.model):
        if not path.is_file():
            raise ConfigError(
                f"expected a finished run, found no {path.name} in {place.path}; continue it with --resume"
            )
    data = load_data(config.data, config.seed)
    model = build_model(config.model, with_weights=False)
    prepare_(model, pick(next(iter(data.test))[0], slice(1)), config.quantization)
    check_seal(place.trained)
    state = read_state(place.trained)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileFormatError(
            f"{place.trained} is not the trained model of this run: {error}; run nipq train again"
        ) from error
    set_phase_(model, Phase.ROUND)
    deployed = load(place.model, build_model(config.model, with_weights=False))
    batches, metric = Few(data.test, config.verify_batches), metric_of(build_task(config))
    return verify(model.eval(), deployed, *files, loader=batches, file=place.model, metric=metric)


def metric_of(task: Task) -> Callable[[nn.Module, Iterable[Batch]], float]:
    """The task's metric as verify calls it."""
    return lambda model, batches: task.scores(model, batches)[task.metric]


def float_bytes(config: ModelConfig) -> int:
    """Bytes of the float network's state dict, four for each number."""
    state = build_model(config, with_weights=False).state_dict()
    return sum(4 * tensor.numel() for tensor in state.values() if tensor.is_floating_point())


def _plots(trainer: Trainer, place: RunFolder, layers: list[dict[str, Any]]) -> str | None:
    """Draw the pictures; without the package, say why not."""
    try:
        plot_bits(layers, place.plots / "bits_per_layer.png")
        if rows := place.rows():
            plot_history(rows, place.plots / "history.png", trainer.task.metric, trainer.task.unit)
        inputs = moved(pick(next(iter(trainer.data.test))[0], slice(64)), trainer.device)
        plot_ranges(histograms(trainer.model, inputs), place.plots / "ranges.png")
    except MissingDependencyError as error:
        return str(error)
    return None


@torch.no_grad()
def histograms(model: nn.Module, inputs: Nested) -> list[Histogram]:
    """Weights, then inputs, of some layers spread over the depth, with their quantizers, recorded from ``inputs``."""
    layers = [row for row in layer_table(model) if not row.spec.is_product]
    rows = [row for row in layers if row.input is not None] or layers  # with weights alone no layer has an input
    chosen = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, PANELS)})]
    seen: dict[str, Tensor] = {}

    def keep(row: LayerRow) -> Any:  # noqa: ANN401 - a hook
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[row.name] = args[0].detach()

        return hook

    handles = [row.input.register_forward_pre_hook(keep(row)) for row in chosen if row.input is not None]
    try:
        call_model(model.eval(), inputs)
    finally:
        for handle in handles:
            handle.remove()
    weights = [
        _histogram(f"{row.name} weight", float_weight(row.layer).detach(), row.weight, is_weight=True) for row in chosen
    ]
    return weights + [
        _histogram(f"{row.name} input", seen[row.name], row.input, is_weight=False)
        for row in chosen
        if row.input is not None
    ]


def _histogram(title: str, values: Tensor, quantizer: TensorQuantizer, *, is_weight: bool) -> Histogram:
    step = float(quantizer.step().max())
    low, high = (float(bound.flatten()[0]) for bound in quantizer.code_range())
    flat = values.flatten()
    drawn = flat[:: even_stride(flat.numel(), SAMPLE)].float().cpu().numpy()
    distance = step * quantizer.grid.codes_per_step
    return Histogram(title, drawn, low * step, high * step, distance, quantizer.bits_rounded, is_weight)


# ---------------------------------------------------------------------- the terminal


class Reporter:
    """Shows a run on the terminal and in TensorBoard; with ``quiet`` only the latter.

    Args:
        tensorboard: folder of the event files; ``None`` for none.
        step: training steps that earlier parts of the run have logged; later ones are dropped from the display.
        quiet: show nothing on the terminal.
    """

    def __init__(self, tensorboard: Path | None, step: int = 0, *, quiet: bool = False) -> None:
        """Open the writer; without the package a message says so and the run goes on."""
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=BAR), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self.console, transient=True,
            disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._writer: Any = None
        if tensorboard is None:
            return
        try:
            board = require("torch.utils.tensorboard", extra="report", purpose="TensorBoard logs")
            self._writer = board.SummaryWriter(str(tensorboard), purge_step=step or None)
        except MissingDependencyError as error:
            self.say(f"[yellow]no TensorBoard log: {error}")

    def __enter__(self) -> Self:
        """Start the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and close the writer."""
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin_epoch(self, title: str, total: int, done: int) -> None:
        """Start the bar of an epoch."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")

    def step(self, numbers: Mapping[str, float | None]) -> None:
        """Advance the bar and show the numbers that are known."""
        if self._task is not None:
            task = self._bar.tasks[-1]
            others = len(task.description) + BAR + 2 * len(str(task.total)) + 1 + len("0:00:00") + 5
            shown = fitting(_numbers(numbers, dict.fromkeys(numbers, "")), self.console.width - others)
            self._bar.update(self._task, advance=1, numbers=shown)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers against the training step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
