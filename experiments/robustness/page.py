"""Table of the robustness study: points lost where the reference has lost five; for ``experiments/write_results.py``.

Strengths between two measured ones are interpolated linearly. Plain numbers are means over seeds of training, with the
standard deviation over them; the perturbations' own seeds are averaged before.
"""

from __future__ import annotations

from typing import Any

from experiments.robustness.curves import (
    budgets,
    corruption_curve,
    drops,
    lost,
    lowered_curve,
    perturbation_curve,
    read_records,
    rows_of,
)
from experiments.shown import PICTURES, Record, picture, spread

#: The row that sets the strength, and the points that it has lost there.
REFERENCE, POINTS = "lsq", 5.0
COLUMNS = {
    "noise on weights": perturbation_curve("weights"),
    "noise on activations": perturbation_curve("activations"),
    "noise on activations, by channel": perturbation_curve("channels"),
    "corrupted images": corruption_curve(),
}


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
        "everywhere, clipping ranges kept and fitted anew; Hessian of the training loss in the weights.",
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


def section() -> str:
    """A table for each budget, one more for the seeds that all methods share, and how they were made."""
    records = read_records()
    if not records:
        return "Nothing is measured yet.\n"
    parts = []
    for budget in budgets(records):
        rows = rows_of(records, budget)
        parts.append(markdown(budget, numbers(rows, REFERENCE, POINTS), REFERENCE, POINTS))
        if shared := of_shared_seeds(rows):
            seeds = ", ".join(str(cell["cell"]["seed"]) for cell in next(iter(shared.values())))
            name = f"{budget}, seed {seeds} alone, which all methods share"
            parts.append(markdown(name, numbers(shared, REFERENCE, POINTS), REFERENCE, POINTS))
    settings = records[0]["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    sizes = f"--images {settings['images']} --train-images {settings['train_images']}"
    return (
        "\n".join(parts) + f"\n{len(records)} networks, mean ± standard deviation where there are several seeds, "
        f"on {settings['images']} test images; curvature on {settings['train_images']} training images. "
        f"`python -m experiments.robustness.run --runs RUNS {sizes}`; {versions}.\n"
    )


def pictures() -> str:
    """All pictures."""
    names = [path.stem for path in sorted(PICTURES.glob("robustness_*.png"))]
    return "\n\n".join(picture(name, name.replace("_", " ")) for name in names) + "\n"


#: Blocks of the pages by name.
BLOCKS = {"robustness": section, "robustness-pictures": pictures}
