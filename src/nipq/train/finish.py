"""The end of a run: convert, save, prove, and write down what came out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nipq.budget.budget import costs
from nipq.config import Phase
from nipq.errors import ConfigError, FileFormatError, MissingDependencyError
from nipq.export.convert import convert
from nipq.export.packed_read import load
from nipq.export.packed_write import file_bytes, save
from nipq.functional.clipping import even_stride
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model
from nipq.prepare.layer_table import LayerRow, layer_table, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.report.summary import summary
from nipq.train.batches import Batch, Few
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task, read_state
from nipq.train.nested import Nested, moved, pick
from nipq.train.plots import Histogram, plot_bits, plot_boundaries, plot_history
from nipq.train.run_folder import RunFolder, write_state, write_table, write_text
from nipq.verify import VerifyResult, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from nipq.train.config import ModelConfig
    from nipq.train.reporter import Reporter
    from nipq.train.task import Task
    from nipq.train.trainer import Trainer

PANELS = 4
"""Layers whose weights and inputs are drawn against their boundaries."""
SAMPLE = 50_000
"""Elements of each tensor that are drawn."""


def finish(trainer: Trainer, place: RunFolder, reporter: Reporter) -> dict[str, Any]:
    """Write everything that a finished run leaves; the results file comes last, so its presence means complete.

    Args:
        trainer: A run whose stage is ``done``.
        place: Its folder.
        reporter: For one line per step.

    Returns:
        The results.
    """
    model = trainer.model.eval()
    table = summary(model)
    layers = table.to_dict()["layers"]
    write_text(place.layers_json, json.dumps(layers, indent=1) + "\n")
    write_table(place.layers_csv, layers)
    write_state(place.trained, model.state_dict())
    deployed = convert(model)
    save(deployed, place.model, overwrite=True)
    reporter.say(f"saved {place.model.name}, {file_bytes(deployed):,} bytes; verifying")
    batches = Few(trainer.data.test, trainer.config.verify_batches)
    outcome = verify(model, deployed, batches, file=place.model, metric=metric_of(trainer.task))
    write_text(place.verify, json.dumps(outcome.to_dict(), indent=1) + "\n")
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
    write_text(place.results, json.dumps(results, indent=1) + "\n")
    return results


def verify_run(place: RunFolder, files: Sequence[Path] = ()) -> VerifyResult:
    """Load a finished run's trained and packed models from its folder and compare them again.

    Args:
        place: The run's folder.
        files: What was exported from the run, to be compared as well.

    Returns:
        What :func:`nipq.verify.verify` found; true when every rung holds.

    Raises:
        ConfigError: If the folder holds no finished run.
        FileFormatError: If a file of the run cannot be read.
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
        plot_boundaries(histograms(trainer.model, inputs), place.plots / "boundaries.png")
    except MissingDependencyError as error:
        return str(error)
    return None


@torch.no_grad()
def histograms(model: nn.Module, inputs: Nested) -> list[Histogram]:
    """Weights and inputs of some layers, spread evenly over the depth, with their quantizers.

    Args:
        model: A prepared model whose bits are frozen.
        inputs: Of the model; what the layers' inputs are recorded from.

    Returns:
        First the weights, then the inputs of the same layers.
    """
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
    return Histogram(title, drawn, low * step, high * step, step, quantizer.bits_rounded, is_weight)
