"""What each part of the default method is worth, in one picture: every row of the ablations against the default.

python experiments/rivals/ablations_plot.py          # writes results/fashion_ablations/plots/differences.png
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "results" / "fashion_ablations"
DEFAULT = "nipq"
COLOURS = {"no": "#1f4e79", "with": "#3a7d44", "lsq": "#7b3f8c"}
LEGEND = {"no": "a part taken away", "with": "a part added or exchanged", "lsq": "LSQ in the same setting"}


def differences() -> dict[str, dict[int, float]]:
    """Points of test accuracy that each row lies above the default, by seed."""
    scores: dict[str, dict[int, float]] = {}
    for path in sorted((FOLDER / "cells").glob("*.json")):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cell, states = record["cell"], record["results"]["states"]
        if cell["budget"] is not None:
            last = states[list(states)[-1]]
            scores.setdefault(cell["row"], {})[cell["seed"]] = last["test"]["accuracy"]
    default = scores.pop(DEFAULT)
    return {
        row: {seed: score - default[seed] for seed, score in found.items() if seed in default}
        for row, found in scores.items()
    }


def main() -> None:
    """Draw it."""
    found = dict(sorted(differences().items(), key=lambda item: statistics.fmean(item[1].values())))
    figure, axis = plt.subplots(figsize=(8.2, 0.3 * len(found) + 1.6), layout="constrained")
    seen: set[str] = set()
    for place, (row, by_seed) in enumerate(found.items()):
        kind = row.split()[0].rstrip(",")
        values = list(by_seed.values())
        axis.barh(place, statistics.fmean(values), color=COLOURS[kind], alpha=0.35, height=0.7)
        label = LEGEND[kind] if kind not in seen else None
        axis.plot(values, [place] * len(values), "o", color=COLOURS[kind], markersize=5, label=label)
        seen.add(kind)
    axis.axvline(0, color="#222222", linewidth=1)
    axis.set_yticks(range(len(found)), list(found))
    axis.set_xlabel("test accuracy minus the default's, same seed [points]")
    title = "Fashion-MNIST, MobileNet-v2, 3/3 average bits\na dot for each seed, bars for their mean"
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(loc="upper left", frameon=False)
    (FOLDER / "plots").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "plots" / "differences.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
