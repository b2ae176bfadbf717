"""Table and picture of the Fashion-MNIST grid, from its records; for ``experiments/write_results.py``.

Mean and standard deviation over seeds of the test accuracy in per cent, last epoch; the paired column is the mean over
seeds of (state - float) with its standard error.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.fashion_mnist.grid import EPOCHS
from experiments.shown import PICTURES, Record, lines_of, origin, picture, spread

HERE = Path(__file__).parent
STATES = ("frozen", "bn", "finetuned")


def load_cells() -> list[Record]:
    """Every finished cell."""
    return lines_of(HERE / "results.jsonl")


def accuracy(cell: dict[str, Any], state: str) -> float:
    """Test accuracy of a named state, per cent."""
    return float(cell["results"]["states"][state]["test"]["accuracy"])


def paired(differences: list[float]) -> str:
    """Mean difference and its standard error."""
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.mean(differences):+.2f} ± {error:.2f}"


def rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each network and budget, with the values of every seed."""
    floats = {
        (c["cell"]["network"], c["cell"]["seed"]): accuracy(c, "float") for c in cells if c["cell"]["bits"] is None
    }
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for cell in cells:
        network, seed, bits = (cell["cell"][key] for key in ("network", "seed", "bits"))
        if bits is None:
            continue
        row = found.setdefault(
            (network, -bits),
            {
                "network": network,
                "bits": bits,
                "float": [],
                "bytes": [],
                "achieved": [],
                "verified": [],
                **{s: [] for s in STATES},
            },
        )
        row["float"].append(floats[network, seed])
        for state in STATES:
            row[state].append(accuracy(cell, state))
        row["bytes"].append(cell["results"]["bytes"]["file"])
        row["achieved"].append(cell["results"]["average_bits"])
        row["verified"].append(cell["results"]["verified"])
    return [found[key] for key in sorted(found)]


def table(cells: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    headings = (
        *("network", "budget W/A", "seeds", "float", "frozen", "+ BN re-estimated", "+ fine-tuned", "minus float"),
        *("average bits W/A, at most", "kB on disk", "verified"),
    )
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows(cells):
        difference = [a - b for a, b in zip(row["finetuned"], row["float"], strict=True)]
        most = [max(bits[side] for bits in row["achieved"]) for side in ("weights", "activations")]
        lines.append(
            f"| {row['network']} | {row['bits']:g}/{row['bits']:g} | {len(row['float'])} | {spread(row['float'])} | "
            + " | ".join(spread(row[state]) for state in STATES)
            + f" | {paired(difference)} | {most[0]:.3f}/{most[1]:.3f} | {statistics.mean(row['bytes']) / 1000:.1f} | "
            f"{sum(row['verified'])} of {len(row['verified'])} |"
        )
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Accuracy against average bits, a point for each seed."""
    found = rows(load_cells())
    networks = sorted({row["network"] for row in found})
    figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks), 4), squeeze=False, layout="constrained")
    for axis, network in zip(axes[0], networks, strict=True):
        mine = [row for row in found if row["network"] == network]
        for state, colour, marker, shift in zip(
            STATES, ("#b35806", "#2166ac", "#1b7837"), "so^", (-0.04, 0, 0.04), strict=True
        ):
            xs = [row["bits"] + shift for row in mine for _ in row[state]]
            ys = [value for row in mine for value in row[state]]
            axis.scatter(xs, ys, c=colour, marker=marker, s=28, label=state, zorder=3)
            axis.plot(
                [row["bits"] + shift for row in mine], [statistics.mean(row[state]) for row in mine], c=colour, lw=1
            )
        level = statistics.mean(value for row in mine for value in row["float"])
        axis.axhline(level, color="#333333", ls="--", lw=1, label=f"float, {level:.2f} %")
        axis.set(title=network, xlabel="average bits of weights and of activations", ylabel="test accuracy in %")
        axis.set_xticks([row["bits"] for row in mine])
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", frameon=False)
    figure.savefig(PICTURES / "fashion_mnist_accuracy.png", dpi=120)
    plt.close(figure)


def section() -> str:
    """Two networks, three budgets: the table and how it was made."""
    cells = load_cells()
    seconds = sum(cell["results"]["seconds"] for cell in cells)
    epochs = "; ".join(f"{network} {a}, {b}, {c}" for network, (a, b, c) in EPOCHS.items())
    return (
        table(cells)
        + "\nTest accuracy in per cent at the last epoch, mean ± standard deviation over seeds; minus float with "
        "its standard error, paired by seed. First and last layers are learned and counted; the 8-bit input is not "
        "counted. Every cell starts from, and is taught by, its seed's float network. Epochs of float training, search "
        f"under noise and fine-tuning with rounding: {epochs}; made before calibration was mended (CHANGELOG), with "
        "bits that start in the middle of their range; the quantized networks have trained longer than "
        "the float ones, so a positive difference is not a gain from quantization. "
        f"{len(cells)} cells, {seconds / 3600:.1f} hours on one thread each: "
        f"`{cells[0]['command']}`; {origin(cells)}.\n\n"
        + picture("fashion_mnist_accuracy", "accuracy against average bits")
        + "\n"
    )


#: Blocks of the pages by name.
BLOCKS = {"fashion-mnist": section}
