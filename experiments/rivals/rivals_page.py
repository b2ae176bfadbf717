"""The results part of docs/rivals.md, from the committed cells; ``experiments/write_results.py`` calls it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from nipq.compare import compare, expand, load_grid
from nipq.compare.show import cells_of, headings, markdown, verdict_line

HERE = Path(__file__).parent
#: Grids with committed cells: name of the YAML file and of the folder in ``results``.
GRIDS = ("fashion_mobilenet_v2", "fashion_bops", "fashion_weights_only", "fashion_ablations")


def page() -> str:
    """Tables, pictures and how they were made; ``ROOT`` stands for the way to the repository's root."""
    parts = [section(name) for name in GRIDS if (HERE / "results" / name / "cells").is_dir()]
    return "\n".join([*parts, calibrated_anew(), tuning()])


def headline(name: str = GRIDS[0], budget: str = "3/3", columns: int = 6) -> str:
    """One budget of one grid in its first columns, for the README.

    Args:
        name: the grid.
        budget: the label of the budget.
        columns: how many columns, up to average bits.
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
        "teacher, epochs and the layers that count are the same for all. * fewer seeds. More, and what each part of "
        "the method is worth: [docs/rivals.md](ROOT/docs/rivals.md).\n"
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
        if path.stem != "training_cost"  # was not measured on a quiet machine
    )
    hours = sum(record["results"]["seconds"] for record in records) / 3600
    return (
        f"{text}\n\n{len(records)} cells, {hours:.1f} hours on one thread each, two side by side on a busy machine: "
        f"`nipq compare experiments/rivals/{name}.yaml --run experiments/rivals/results/{name} --data FOLDER "
        f"--workers 2`; {where(records)}.\n\n{pictures}\n"
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
        last = record["validation"].get("finetuned", record["validation"]["float"])
        fields = f"`{json.dumps(record['fields'])}`" if record["fields"] else ""
        lines.append(f"| {record['method']} | {fields} | {last[metric]:.{digits}f} | {last['loss']:.4f} |")
    return "\n".join(lines)


def where(records: list[dict[str, Any]]) -> str:
    """Machine and versions on one line; several versions where cells were made with several."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, number in record["versions"].items():
            found.setdefault(name, set()).update([number] if number else [])
    versions = ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in found.items() if numbers)
    machine = records[0]["machine"]
    return f"{machine['processor'] or 'CPU'}, {machine['cores']} cores; {versions}"
