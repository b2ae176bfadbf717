"""The results part of docs/tasks.md, from the committed cells of its grids, for ``experiments/write_results.py``."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.rivals.rivals_page import candidates, where
from nipq.compare import compare, expand, load_grid
from nipq.compare.show import markdown

HERE = Path(__file__).parent


def page() -> str:
    """Tables and how they were made."""
    parts = [section(path) for path in sorted(HERE.glob("*.yaml")) if cells_of(path)]
    return "\n".join([*parts, *(tuning(path) for path in sorted(HERE.glob("results/*_tuning")))])


def tuning(folder: Path) -> str:
    """What was tried on the validation samples before a grid ran.

    Args:
        folder: of the records, named like the file of the candidates.
    """
    name = folder.name.removesuffix("_tuning")
    return (
        f"### Candidates: {name}\n\n{candidates(folder)}\n\nValidation samples of one seed: "
        f"`python experiments/tune.py experiments/tasks/{name}_candidates.yaml --data FOLDER --runs RUNS`.\n"
    )


def section(path: Path) -> str:
    """One grid: its table and its machine.

    Args:
        path: the grid's file.
    """
    grid = load_grid(path)
    text = markdown(compare(grid, expand(grid), HERE / "results" / path.stem), cost=False)
    text = "\n".join("##" + line if line.startswith("#") else line for line in text.splitlines())
    records = [json.loads(cell.read_text(encoding="utf-8")) for cell in cells_of(path)]
    hours = sum(record["results"]["seconds"] for record in records) / 3600
    return (
        f"{text}\n\n{len(records)} of {len(expand(grid))} cells so far, {hours:.1f} hours on one thread each, on a "
        "busy machine: "
        f"`nipq compare experiments/tasks/{path.name} --run experiments/tasks/results/{path.stem} --data FOLDER`; "
        f"{where(records)}.\n"
    )


def cells_of(path: Path) -> list[Path]:
    """Files of a grid's committed cells.

    Args:
        path: the grid's file.
    """
    return sorted((HERE / "results" / path.stem / "cells").glob("*.json"))
