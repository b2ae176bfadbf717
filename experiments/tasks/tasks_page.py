"""The results part of docs/tasks.md, from the committed cells of its grids, for ``experiments/write_results.py``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.speed_page import table
from experiments.rivals.rivals_page import candidates, where
from nipq.compare import Comparison, compare, expand, load_grid
from nipq.compare.show import interval, markdown

HERE = Path(__file__).parent


def page() -> str:
    """Tables and how they were made."""
    grids = [path for path in sorted(HERE.glob("*.yaml")) if cells_of(path)]
    tables = [*map(section, grids), stages(HERE / "decoder.yaml", "4/8")]
    tables += map(tuning, sorted(HERE.glob("results/*_tuning")))
    return "\n".join([overview(grids), *tables])


def overview(grids: list[Path]) -> str:
    """One line for each task and budget: the float network, ours, LSQ, and the best rival.

    Args:
        grids: files of the grids.
    """
    lines = [
        "### All tasks\n",
        "| task | budget | score | seeds | float | nipq | lsq | best rival | nipq minus best rival |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in grids:
        comparison = compared(path)
        digits = 2 if comparison.metric.unit in ("%", "dB") else 4
        for block in comparison.blocks:
            rows = {row.label: row for row in block.rows}
            if comparison.float_row is None or block.verdict is None:
                continue
            rival = rows[block.verdict.rival]
            shown = (comparison.float_row, rows["nipq"], rows.get("lsq"))
            direction = "" if comparison.metric.higher_is_better else ", lower is better"
            entries = [
                comparison.name, block.budget, comparison.metric.title + direction, str(len(rows["nipq"].seeds)),
                *("-" if row is None else interval(row.score, digits) for row in shown),
                f"{rival.label}: {interval(rival.score, digits)}",
                interval(block.verdict.difference, digits, sign=True),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines) + "\n\nTest split, last state; mean and 95 % interval where there are several seeds.\n"


def compared(path: Path) -> Comparison:
    """What the committed cells of a grid say.

    Args:
        path: the grid's file.
    """
    grid = load_grid(path)
    return compare(grid, expand(grid), HERE / "results" / path.stem)


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
    text = markdown(compared(path), cost=False)
    text = "\n".join("##" + line if line.startswith("#") else line for line in text.splitlines())
    records = [json.loads(cell.read_text(encoding="utf-8")) for cell in cells_of(path)]
    hours = sum(record["results"]["seconds"] for record in records) / 3600
    return (
        f"{text}\n\n{len(records)} of {len(expand(grid))} cells so far, {hours:.1f} hours on one thread each, on a "
        "busy machine: "
        f"`nipq compare experiments/tasks/{path.name} --run experiments/tasks/results/{path.stem} --data FOLDER`; "
        f"{where(records)}.\n"
    )


def stages(path: Path, budget: str) -> str:
    """How far each row's search brought its bits, and what the freeze and the fine-tuning made of that.

    Args:
        path: the grid's file.
        budget: the label of the budget.
    """
    rows: dict[str, list[list[float]]] = {}
    comparison = compared(path)
    for cell in cells_of(path):
        record = json.loads(cell.read_text(encoding="utf-8"))
        if record["cell"]["budget"] == budget:
            # Tables have no input to quantize, and 8 fixed bits.
            of_weights = [bits[0] for bits in record["learned_bits"].values() if bits[1] is not None]
            states = record["results"]["states"]
            scores = [states[state]["test"][comparison.metric.name] for state in ("frozen", "finetuned")]
            rows.setdefault(record["cell"]["row"], []).append([statistics.mean(of_weights), *scores])
    lines = []
    for row, those in rows.items():
        bits, frozen, tuned = map(statistics.mean, zip(*those, strict=True))
        lines.append([row, str(len(those)), f"{bits:.2f}", f"{frozen:.4f}", f"{tuned:.4f}"])
    title = comparison.metric.title
    headings = ["row", "seeds", "weight bits where the search ends", f"{title}, frozen", f"{title}, fine-tuned"]
    return (
        f"### {comparison.name}, budget {budget}, stage by stage\n\n"
        + table(headings, lines)
        + "\nBits are the continuous ones, a mean over the linear layers; scores those of the test split.\n"
    )


def cells_of(path: Path) -> list[Path]:
    """Files of a grid's committed cells.

    Args:
        path: the grid's file.
    """
    return sorted((HERE / "results" / path.stem / "cells").glob("*.json"))
