"""The results part of docs/rivals.md, from the committed cells; ``experiments/write_results.py`` calls it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import read as read_benchmark
from benchmarks.speed_page import number, origin, span, table
from nipq.compare import compare, expand, load_grid
from nipq.compare.grid import FLOAT
from nipq.compare.show import cells_of, headings, markdown, verdict_line
from nipq.compare.table import final_state
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.train.config import ModelConfig
from nipq.train.factory import build_model

HERE = Path(__file__).parent
#: Grids with committed cells: name of the YAML file and of the folder in ``results``.
GRIDS = ("fashion_mobilenet_v2", "fashion_bops", "fashion_weights_only", "fashion_ablations")


def page() -> str:
    """Tables, pictures and how they were made; ``ROOT`` stands for the way to the repository's root."""
    parts = [section(name) for name in GRIDS if (HERE / "results" / name / "cells").is_dir()]
    return "\n".join([*parts, validation(), ends(), costs(), calibrated_anew(), tuning()])


def headline(name: str = GRIDS[0], budget: str = "3/3", columns: int = 7) -> str:
    """One budget of one grid in its first columns, for the README.

    Args:
        name: the grid.
        budget: the label of the budget.
        columns: how many columns, up to bit-operations.
    """
    grid = load_grid(HERE / f"{name}.yaml")
    comparison = compare(grid, expand(grid), HERE / "results" / name)
    block = next(block for block in comparison.blocks if block.budget == budget)
    first = [] if comparison.float_row is None else [comparison.float_row]
    table = [headings(comparison), ["---"] * columns, *(cells_of(row, comparison) for row in (*first, *block.rows))]
    return (
        f"### Fashion-MNIST, MobileNet-v2 against its rivals, {budget} average bits\n\n"
        + "\n".join(f"| {' | '.join(line[:columns])} |" for line in table)
        + f"\n\n{verdict_line(block, comparison)}. Test accuracy at the last epoch, mean and 95 % interval over seeds; "
        "differences are paired by seed. A MobileNet-v2 of 46 thousand parameters on 20,000 images; float start, "
        "teacher, epochs and the layers that count are the same for all; bit-operations are not, "
        "see there for rows that are held to them. * fewer seeds. More, and what each part of the method is worth: "
        "[docs/rivals.md](ROOT/docs/rivals.md).\n"
    )


def section(name: str) -> str:
    """One grid: its table, its plots, its machine."""
    grid = load_grid(HERE / f"{name}.yaml")
    folder = HERE / "results" / name
    text = markdown(compare(grid, expand(grid), folder), cost=False)
    text = "\n".join("##" + line if line.startswith("#") else line for line in text.splitlines())
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    pictures = "\n\n".join(
        f"![{path.stem}](ROOT/{path.relative_to(HERE.parents[1]).as_posix()})"
        for path in sorted((folder / "plots").glob("*.png"))
        if path.stem != "training_cost"  # cells ran on a busy machine; costs() has the cost
    )
    hours = sum(record["results"]["seconds"] for record in records) / 3600
    return (
        f"{text}\n\n{len(records)} cells, {hours:.1f} hours on one thread each, two side by side on a busy machine: "
        f"`nipq compare experiments/rivals/{name}.yaml --run experiments/rivals/results/{name} --data FOLDER "
        f"--workers 2`; {where(records)}.\n\n{pictures}\n"
    )


def validation(name: str = GRIDS[3]) -> str:
    """The rows of one grid by their validation score, the first seed of each.

    Args:
        name: the grid.
    """
    rows = []
    for path in (HERE / "results" / name / "cells").glob("*-seed0.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        last = list(record["results"]["states"].values())[-1]
        rows.append((record["cell"]["row"], *(last[split]["accuracy"] for split in ("validation", "test"))))
    base = next(row for row in rows if row[0] == "nipq")
    lines = [
        [row, f"{scores[0]:.2f}", *(f"{score - of:+.2f}" for score, of in zip(scores, base[1:], strict=True))]
        for row, *scores in sorted(rows, key=lambda row: -row[1])
    ]
    return (
        f"### {name}, by validation accuracy\n\n"
        + table(["row", "validation accuracy [%]", "minus nipq", "the same on the test images"], lines)
        + "\nSeed 0; 5,000 validation images. Whether a part is kept is judged by these, not by the test images.\n"
    )


def ends(name: str = GRIDS[0], budget: str = "3/3") -> str:
    """Average bits of every row with learned bits at the end of its search, before the freeze.

    Args:
        name: the grid.
        budget: the label of the budget.
    """
    grid = load_grid(HERE / f"{name}.yaml")
    model = prepare_(build_model(ModelConfig.model_validate(grid.base["model"])), torch.zeros(1, 1, 28, 28))
    counts = {row.spec.name: (row.spec.weight_count, row.spec.activation_count) for row in layer_table(model)}
    found: dict[str, list[list[float]]] = {}
    places = [path for one in (name, GRIDS[3]) for path in (HERE / "results" / one / "cells").glob("*.json")]
    for path in sorted(places):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["cell"]["budget"] == budget and record["learned_bits"]:
            found.setdefault(record["cell"]["row"], []).append(_averages(record["learned_bits"], counts))
    lines = []
    for row, those in found.items():
        weights, inputs = (statistics.mean(side) for side in zip(*those, strict=True))
        if max(weights, inputs) > 3.05:
            lines.append([row, str(len(those)), f"{weights:.2f}", f"{inputs:.2f}"])
    return (
        "### Searches that did not reach the budget\n\n"
        + table(["row", "seeds", "average weight bits", "average input bits"], lines)
        + f"\nAt the end of the search, of the continuous bit-widths; budget {budget}. The freeze cuts them to the "
        "budget at once. All other rows with learned bits were within 0.05 of it.\n"
    )


def _averages(bits: dict[str, list[float]], counts: dict[str, tuple[int, int]]) -> list[float]:
    """Weights' and inputs' average bits over elements; what has 8 fixed bits, the image, is not among the inputs."""
    first = next(iter(bits))
    sides = []
    for side in (0, 1):
        those = [(bits[layer][side], counts[layer][side]) for layer in bits if not (side and layer == first)]
        sides.append(sum(b * n for b, n in those) / sum(n for _, n in those))
    return sides


def costs() -> str:
    """What a training step of each method costs."""
    content = read_benchmark("methods")
    if content is None:
        return ""
    rows = [[word, number(row["milliseconds"]), span(row["ratio"])] for word, row in content["rows"].items()]
    return (
        "### Training cost\n\n"
        + table(["method", "step, ms", "float step"], rows)
        + f"\nThe network of the first grid, {content['batch']} images, without a teacher; CPU time on one thread, "
        f"median (quartiles) of the ratios within a round. {origin(content)}\n"
        "![training cost](ROOT/benchmarks/results/methods.png)\n"
    )


def calibrated_anew() -> str:
    """Cells of the first grid, trained again after calibration was mended, beside those of the table."""
    folder = HERE / "results" / "calibration_fix"
    scores: dict[Path, list[float]] = {folder: [], HERE / "results" / GRIDS[0] / "cells": []}
    for path in sorted(folder.glob("*.json")):
        for place, found in scores.items():
            record = json.loads((place / path.name).read_text(encoding="utf-8"))
            found.append(record["results"]["states"]["finetuned"]["test"]["accuracy"])
    new, old = (f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" for found in scores.values())
    return (
        "### Calibration, before and after\n\n"
        f"nipq at 3/3, {len(scores[folder])} seeds, trained anew with today's calibration (and today's kernels): "
        f"{new} % instead of {old} %, mean and standard deviation on the test images. Records in "
        "`experiments/rivals/results/calibration_fix`, made like those of the first grid.\n"
    )


def tuning() -> str:
    """The candidates of ``candidates.yaml``: what the validation images said."""
    return (
        "### Learning rate and cut of the epochs\n\n"
        + candidates(HERE / "results/tuning")
        + "\n\nSeed 0, budget 3/3, 5,000 validation images (standard error about 0.45 points, so most candidates are "
        "level). Chosen for all rows: learning rate 0.05, four epochs and one; other fields are the grid's. "
        "More was tried for the noise proxy than for LSQ: its start of bits came out of this table. The last of LSQ "
        "and the last four of nipq, the first of them the default once more, came after calibration was mended: on "
        "this network the cut of the epochs makes no difference; on MobileNet-v3 (docs/tasks.md) it does. "
        "`python experiments/tune.py experiments/rivals/candidates.yaml --data FOLDER --runs RUNS`.\n"
    )


def candidates(folder: Path) -> str:
    """What ``experiments/tune.py`` wrote, as a table.

    Args:
        folder: of the records.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem.rpartition("-")[0], len(path.stem), path.stem))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    metric = next(name for name in records[0]["validation"]["float"] if name not in ("loss", "count"))
    unit, digits = (" [%]", 2) if metric == "accuracy" else ("", 4)
    lines = [f"| method | fields | validation {metric}{unit} | validation loss |", "|---|---|---|---|"]
    for record in records:
        states = record["validation"]
        last = states[final_state(states, is_float=record["method"] == FLOAT)]
        fields = f"`{json.dumps(record['fields'])}`" if record["fields"] else ""
        lines.append(f"| {record['method']} | {fields} | {last[metric]:.{digits}f} | {last['loss']:.4f} |")
    return "\n".join(lines)


def where(records: list[dict[str, Any]]) -> str:
    """Machine and versions on one line; several versions where cells were made with several."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            found.setdefault(name, set()).update([version] if version else [])
    versions = ", ".join(f"{name} {' and '.join(sorted(those))}" for name, those in found.items() if those)
    machine = records[0]["machine"]
    return f"{machine['processor'] or 'CPU'}, {machine['cores']} cores; {versions}"
