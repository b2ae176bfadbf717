"""Draw the README's picture: accuracy against average bits, and the bit-widths that one run gave its layers.

python experiments/write_results.py --pictures     # draws it, too

Both panels are drawn from the records of ``experiments/baselines/fashion_mobilenet_v2.yaml``; nothing is trained.
"""

from __future__ import annotations

import statistics

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy.stats import t

from experiments.baselines.page import HERE, MAIN, records_of
from experiments.shown import PICTURES, Record
from nipq.train.compare_table import final_state

OUT = PICTURES / "readme_accuracy_and_bits.png"

#: Rows that are drawn, from the row's name in the records: label, colour, marker, shift along the axis of bits, and
#: where the label stands beside a point: its budget, offset in points, alignment.
ROWS = {
    "nipq": ("nipq", "#c6530b", "o", 0.0, ("2.5/2.5", (-8, 8), "right")),
    "lsq, HAWQ bits": ("LSQ, bits by HAWQ", "#7b2d8b", "D", -0.035, ("2.5/2.5", (8, -52), "left")),
    "lsq": ("LSQ, one bit-width", "#1f4e79", "s", 0.035, ("4/4", (-46, -62), "center")),
    "lsq+": ("LSQ+", "#2e7d32", "^", 0.07, ("3/3", (10, -24), "left")),
}
#: The run whose bit-widths are drawn.
RUN = ("nipq", "3/3", 0)


def accuracies(found: list[Record], row: str) -> dict[str, list[float]]:
    """Test accuracy of the last state in per cent, by budget, one number a seed."""
    result: dict[str, list[float]] = {}
    for record in found:
        if record["cell"]["row"] == row:
            states = record["results"]["states"]
            last = states[final_state(states, is_float=False)]
            result.setdefault(record["cell"]["budget"], []).append(last["test"]["accuracy"])
    return result


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def draw_accuracy(axes: Axes, found: list[Record]) -> None:
    """Accuracy against average bits, a line for each method."""
    floats = [r["results"]["states"]["float"]["test"]["accuracy"] for r in found if r["cell"]["row"] == "float"]
    level = statistics.mean(floats)
    axes.axhline(level, color="#333333", linestyle="--", linewidth=1.2)
    axes.text(2.42, level + 0.07, f"float32, {level:.1f} %", color="#333333", fontsize=10)
    for row, (label, colour, marker, shift, (budget, offset, side)) in ROWS.items():
        points = sorted((float(budget.split("/")[0]), values) for budget, values in accuracies(found, row).items())
        bits = [number + shift for number, _ in points]
        means = [statistics.mean(values) for _, values in points]
        axes.errorbar(
            bits,
            means,
            [half_interval(values) for _, values in points],
            color=colour,
            marker=marker,
            markersize=7 if row == "nipq" else 6,
            linewidth=2.6 if row == "nipq" else 1.5,
            elinewidth=1,
            capsize=3,
        )
        place = next(k for k, (number, _) in enumerate(points) if number == float(budget.split("/")[0]))
        axes.annotate(
            label,
            (bits[place], means[place]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            color=colour,
            fontsize=11,
            fontweight="bold" if row == "nipq" else "normal",
        )
    axes.set(
        xlim=(2.25, 4.2),
        ylim=(85.2, 90.5),
        xticks=[2.5, 3, 4],
        xlabel="average bits, weights and activations alike",
        ylabel="test accuracy [%]",
        title="MobileNet-v2, Fashion-MNIST: mean and 95 % interval of 3 seeds",
    )


def draw_bits(axes: Axes, found: list[Record]) -> None:
    """Learned bit-widths of the layers of one run, before they are rounded."""
    (record,) = (r for r in found if (r["cell"]["row"], r["cell"]["budget"], r["cell"]["seed"]) == RUN)
    names = list(record["learned_bits"])
    weights, activations = zip(*record["learned_bits"].values(), strict=True)
    places = range(len(names))
    axes.bar([p - 0.2 for p in places], weights, 0.4, color="#c6530b", label="weights")
    axes.bar([p + 0.2 for p in places], activations, 0.4, color="#f2b98f", label="activations")
    axes.axhline(3, color="#333333", linestyle=":", linewidth=1.2)
    axes.text(len(names) + 0.1, 3, "average\n3 bits", va="center", fontsize=10, color="#333333")
    axes.set(
        xlim=(-0.8, len(names) - 0.2),
        ylim=(0, 8.6),
        xticks=[0, len(names) - 1],
        ylabel="bits",
        title=f"Bits that nipq learned for its {len(names)} layers, budget 3/3, before rounding",
    )
    axes.set_xticklabels(["first layer", "last layer"])
    axes.legend(loc="upper center", frameon=False, fontsize=10)


def draw() -> None:
    """Write the picture."""
    found = list(records_of(HERE / f"{MAIN}.yaml").values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.3), width_ratios=(1.1, 1), layout="constrained")
    draw_accuracy(left, found)
    draw_bits(right, found)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(11)
    figure.savefig(OUT, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
