"""At the perturbation where the reference has lost five points, how much has each other method lost?

    python experiments/robustness/table.py [--reference lsq] [--points 5]     # writes results/table.md and table.json

Strengths between two measured ones are interpolated linearly. Plain numbers are means over seeds of training, with the
standard deviation over them; the perturbations' own seeds are averaged before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from robustness import (
    RESULTS,
    Record,
    budgets,
    corruption_curve,
    drops,
    lost,
    lowered_curve,
    perturbation_curve,
    read_records,
    rows_of,
)

COLUMNS = {
    "noise on weights": perturbation_curve("weights"),
    "noise on activations": perturbation_curve("activations"),
    "noise on activations, by channel": perturbation_curve("channels"),
    "corrupted images": corruption_curve(),
}


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def numbers(rows: dict[str, list[Record]], reference: str, points: float) -> dict[str, Any]:
    """Everything in the table of one budget."""
    columns = {name: drops(rows, curve, reference, points) for name, curve in COLUMNS.items()}
    table = {}
    for row, cells in rows.items():
        metric = cells[0]["metric"]["name"]
        table[row] = {
            "seeds": len(cells),
            "clean": [cell["clean"][metric] for cell in cells],
            "lost": {name: column["lost"].get(row, []) for name, column in columns.items()},
            "one bit less": {
                way: [lost(cell, curve)[1] for cell in cells if 1 in (curve := lowered_curve(way)(cell))]
                for way in ("kept", "refit")
            },
            "trace": [cell["curvature"]["total"]["trace"] for cell in cells if "curvature" in cell],
            "eigenvalue": [cell["curvature"]["eigenvalue"] for cell in cells if "curvature" in cell],
        }
    return {"strength": {name: column["strength"] for name, column in columns.items()}, "rows": table}


def of_shared_seeds(rows: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The rows without what was measured on seeds that another row lacks; empty if nothing is left, or left out."""
    seeds = [{cell["cell"]["seed"] for cell in cells} for cells in rows.values()]
    shared = set.intersection(*seeds)
    if not shared or shared == set.union(*seeds):
        return {}
    return {row: [cell for cell in cells if cell["cell"]["seed"] in shared] for row, cells in rows.items()}


def markdown(budget: str, found: dict[str, Any], reference: str, points: float) -> str:
    """One budget's table."""
    heads: list[str] = []
    for name, strength in found["strength"].items():
        scale = "severity" if name == "corrupted images" else "strength"
        heads.append(
            f"{name}, {scale} {strength:.3g}" if strength is not None else f"{name} ({reference} not at {points:g})"
        )
    heads += ["1 bit less, kept", "1 bit less, fitted", "trace", "top eigenvalue"]
    lines = [
        f"Budget {budget}. Points lost where {reference} has lost {points:g}; then points lost with one bit less "
        "everywhere, boundaries kept and fitted anew; Hessian of the training loss in the weights.",
        "",
        f"| {' | '.join(['method', 'seeds', 'clean', *heads])} |",
        "| --- | --- | --- |" + " --- |" * len(heads),
    ]
    for row, entry in found["rows"].items():
        cells = [spread(values) for values in entry["lost"].values()]
        cells += [spread(values) for values in entry["one bit less"].values()]
        cells += [spread(entry["trace"], 1), spread(entry["eigenvalue"], 2)]
        lines.append(f"| {row} | {entry['seeds']} | {spread(entry['clean'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="lsq", help="the row that sets the strength")
    parser.add_argument("--points", type=float, default=5.0, help="how much it has lost there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    records = read_records(arguments.results / "cells")
    found = {}
    for budget in budgets(records):
        rows = rows_of(records, budget)
        found[budget] = numbers(rows, arguments.reference, arguments.points)
        if shared := of_shared_seeds(rows):
            seeds = ", ".join(str(cell["cell"]["seed"]) for cell in next(iter(shared.values())))
            name = f"{budget}, seed {seeds} alone, which all methods share"
            found[name] = numbers(shared, arguments.reference, arguments.points)
    text = "\n".join(markdown(budget, one, arguments.reference, arguments.points) for budget, one in found.items())
    result = {"reference": arguments.reference, "points": arguments.points, "budgets": found}
    (arguments.results / "table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.results / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
