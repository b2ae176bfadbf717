"""Robustness of the trained networks of a comparison, measured for every method, budget and seed.

    python -m experiments.robustness.run --runs FOLDER [--data DATA] [--images 2000] [--only PATTERN]

FOLDER is what ``nipq compare GRID.yaml --run FOLDER`` wrote: FOLDER/runs/NAME is a run, and its line in
FOLDER/cells.jsonl says which method, budget and seed it is. Without that line a run called ROW-seedN is taken for row
ROW. A float cell is measured as the float network, without any rounding. Each run has a line in results.jsonl, and
properties that are in it already are not measured again, so the command may be killed and repeated.

Accuracies are those of the first test images; curvature and landscapes are of the task's loss on the first training
images, unaugmented. All noise is drawn from fixed seeds, the same for all methods.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.robustness.corruption import corruption_sweep, value_range
from experiments.robustness.landscape import landscape
from experiments.robustness.perturbation import lowered_sweep, perturbation_sweep
from nipq.budget.hessian import curvature, is_quantized
from nipq.prepare.layer_table import set_phase_
from nipq.prepare.prepare import prepare_
from nipq.train.batches import pick
from nipq.train.compare import CompareFolder
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task, read_state
from nipq.train.records import Record, Records
from nipq.train.run_folder import RunFolder
from nipq.train.task import Task

RESULTS = Path(__file__).parent / "results.jsonl"
BATCH = 500
SEEDS = (0, 1, 2)
STRENGTHS = {
    "weights": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    "activations": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "channels": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
}


@dataclass
class Subject:
    """One trained network with what it is measured on."""

    model: nn.Module
    task: Task
    test: list[tuple[Any, Any]]
    train: list[tuple[Any, Any]]


def first(split: Any, count: int) -> list[tuple[Any, Any]]:  # noqa: ANN401 - any split
    """The first samples of a split, in whole evaluation batches, the last one cut."""
    found, left = [], count
    for inputs, targets in split:
        size = len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))
        cut = slice(min(left, size))
        found.append((pick(inputs, cut), pick(targets, cut)))
        left -= size
        if left <= 0:
            break
    return found


def load(place: RunFolder, data: str | None, images: int, train_images: int, *, as_float: bool) -> Subject:
    """Rebuild the trained network of a run, or its float network."""
    config = place.read_config()
    section = config.data.model_copy(update={"eval_batch_size": BATCH} | ({"path": data} if data else {}))
    sources = load_data(section, config.seed)
    model = build_model(config.model, with_weights=False)
    test, train = first(sources.test, images), first(sources.train, train_images)
    if as_float:
        model.load_state_dict(read_state(place.float))
    else:
        prepare_(model, pick(test[0][0], slice(1)), config.quantization)
        model.load_state_dict(read_state(place.trained))
        set_phase_(model, "round")
    return Subject(model.eval(), build_task(config), test, train)


def measures(subject: Subject) -> dict[str, Callable[[], Any]]:
    """Every property by name, as a function that measures it."""
    model, task = subject.model, subject.task
    scores, small = task.scores, subject.train[:1]

    def lines() -> list[dict[str, Any]]:
        return [landscape(model, subject.train, scores, points=21, seed=seed).to_dict() for seed in SEEDS]

    def plane() -> dict[str, Any]:
        return landscape(model, small, scores, dimensions=2, points=13, seed=100).to_dict()

    found: dict[str, Callable[[], Any]] = {
        "clean": lambda: scores(model, subject.test),
        "perturbation": lambda: perturbation_sweep(model, subject.test, scores, **STRENGTHS, seeds=SEEDS).to_dict(),
        "curvature": lambda: curvature(model, subject.train, task.loss, probes=32, tolerance=1e-2).to_dict(),
        "landscape_1d": lines,
        "landscape_2d": plane,
    }
    if is_quantized(model):
        found["lowered"] = lambda: lowered_sweep(
            model, subject.test, scores, by=(1, 2), fitting=subject.train
        ).to_dict()
    inputs = subject.test[0][0]
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
        black, white = value_range(subject.test)
        found["corruption"] = lambda: corruption_sweep(model, subject.test, scores, black=black, white=white).to_dict()
    return found


def identity(folder: Path, name: str) -> Record:
    """Row, budget and seed of a run."""
    record = CompareFolder(folder).records.read().get(name)
    if record is not None:
        found: Record = record["cell"]
        return found
    parts = re.fullmatch(r"(.+)-seed(\d+)", name)
    row, seed = (parts[1], int(parts[2])) if parts else (name, 0)
    is_float = row.split("-")[-1] == "float"
    return {"name": name, "row": "float" if is_float else row, "budget": None if is_float else "all", "seed": seed}


def measure(folder: Path, name: str, arguments: argparse.Namespace) -> None:
    """Measure the properties that the run's record lacks, writing after each."""
    results = Records(arguments.results)
    settings = {"images": arguments.images, "train_images": arguments.train_images}
    record = results.read().get(name, {"settings": settings})
    if record["settings"] != settings:
        raise SystemExit(f"{name} was measured with {record['settings']}, not {settings}; remove its line")
    cell = identity(folder, name)
    run = RunFolder(folder / "runs" / name)
    as_float = cell["budget"] is None
    subject = load(run, arguments.data, arguments.images, arguments.train_images, as_float=as_float)
    record |= {
        "cell": cell,
        "settings": settings,
        "metric": subject.task.to_dict(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("nipq", "torch", "curvlinops-for-pytorch")},
    }
    for property_, run_it in measures(subject).items():
        if property_ not in record:
            record[property_] = run_it()
            results.append(record, replace=True)
            print(f"{name}: {property_}", flush=True)


def main() -> None:
    """Measure every finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of nipq compare")
    parser.add_argument("--data", help="where the data lie, if not where the runs say")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--train-images", type=int, default=512, help="training images for curvature and landscapes")
    parser.add_argument("--only", default="*", help="glob of run names")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for path in sorted((arguments.runs / "runs").glob(arguments.only)):
        if (path / "results.json").is_file():
            measure(arguments.runs, path.name, arguments)


if __name__ == "__main__":
    main()
