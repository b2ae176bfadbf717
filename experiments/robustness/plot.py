"""One picture for each property and budget, all methods in it: mean over seeds, and the band between the extreme seeds.

python experiments/write_results.py --pictures     # draws these, too
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.robustness.corruption import CORRUPTIONS
from experiments.robustness.curves import (
    Curve,
    budgets,
    corruption_curve,
    landscape_curve,
    lowered_curve,
    mean_curve,
    metric_of,
    perturbation_curve,
    read_records,
    rows_of,
)
from experiments.shown import PICTURES, Record

COLOURS = (
    "#c55a11", "#1f4e79", "#3a7d44", "#7b3f8c", "#8c6d1f", "#117a7a", "#a1243b", "#5a6fbf", "#6b8e23", "#4d4d4d",
    "#e377c2", "#00a0c6", "#d4a017", "#2f2f8f",
)  # fmt: skip
MARKERS = "osD^vP*Xh<>pH8"
LEVELS = 16
OURS = "nipq"
NOISES = {"weights": "weights", "activations": "activations", "channels": "activations, by channel"}

Rows = dict[str, list[Record]]


def styles(rows: Rows) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all panels: float a dashed grey line, nipq a thick one."""
    found: dict[str, dict[str, Any]] = {"float": {"color": "#808080", "linestyle": "--", "marker": ""}}
    for place, row in enumerate(sorted((row for row in rows if row != "float"), key=lambda row: row != OURS)):
        found[row] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
    if OURS in found:
        found[OURS] |= {"linewidth": 2.6, "markersize": 6, "zorder": 3}
    return found


def panel(axis: Any, rows: Rows, curve_of: Callable[[Record], Curve], title: str, xlabel: str, ylabel: str) -> bool:  # noqa: ANN401
    """Curves of all methods in one panel; says whether there were any."""
    style, drawn = styles(rows), False
    for row, cells in rows.items():
        curves = [curve for cell in cells if len(curve := curve_of(cell)) > 1]
        if not curves:
            continue
        mean = mean_curve(curves)
        xs = list(mean)
        axis.plot(xs, list(mean.values()), label=row, **{"linewidth": 1.2} | style[row])
        if len(curves) > 1:
            low, high = ([pick(curve[x] for curve in curves) for x in xs] for pick in (min, max))
            axis.fill_between(xs, low, high, color=style[row]["color"], alpha=0.15, linewidth=0)
        drawn = True
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    return drawn


def grid(panels: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels."""
    lines = -(-panels // columns)
    size = max(9.0, 4.2 * columns), 3.5 * lines + 0.5  # the legend wants its width, and a line or two
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.set_visible(False)
    return figure, flat[:panels]


def save(figure: Any, axes: list[Any], path: Path) -> None:  # noqa: ANN401
    """Legend below all panels, then the file."""
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[1]))
    if labels:
        columns = max(2, int(figure.get_figwidth() / 2.6))  # inches of an entry with a long name
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(rows: Rows, metric: str, name: Callable[[str], Path]) -> None:
    """Perturbation, corruption, fewer bits, and the loss along a line."""
    figure, axes = grid(3, 3)
    for axis, (kind, title) in zip(axes, NOISES.items(), strict=True):
        unit = "channel" if kind == "channels" else "tensor"
        panel(
            axis, rows, perturbation_curve(kind), f"Gaussian noise on {title}", f"strength [RMS of the {unit}]", metric
        )
    save(figure, axes, name("perturbation"))
    figure, axes = grid(len(CORRUPTIONS) + 1, 4)
    panels = [None, *CORRUPTIONS]
    drawn = [
        panel(axis, rows, corruption_curve(one), one.replace("_", " ") if one else "mean of all", "severity", metric)
        for axis, one in zip(axes, panels, strict=True)
    ]
    if any(drawn):
        save(figure, axes, name("corruption"))
    figure, axes = grid(2, 2)
    drawn = [
        panel(axis, rows, lowered_curve(way), f"clipping ranges {way}", "bits taken from every tensor [bit]", metric)
        for axis, way in zip(axes, ("kept", "refit"), strict=True)
    ]
    for axis in axes:
        axis.set_xticks([0, 1, 2])
    if any(drawn):
        save(figure, axes, name("lowered"))
    figure, axes = grid(1, 1)
    panel(
        axes[0], rows, landscape_curve, "loss along random directions", "step [length of the filter]", "training loss"
    )
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes[0].minorticks_off()
    save(figure, axes, name("landscape_1d"))


def curvatures(rows: Rows, path: Path) -> None:
    """Trace and top eigenvalue: a dot for each seed, a mark for the mean; methods are powers of ten apart."""
    figure, axes = grid(2, 2)
    figure.set_figwidth(11)  # the names of the rows take their part of it
    style = styles(rows)
    for axis, title, value in (
        (axes[0], "trace of the Hessian", lambda found: found["total"]["trace"]),
        (axes[1], "top eigenvalue of the Hessian", lambda found: found["eigenvalue"]),
    ):
        for place, (row, cells) in enumerate(rows.items()):
            values = [value(cell["curvature"]) for cell in cells if "curvature" in cell]
            if not values:
                continue
            axis.plot(values, [place] * len(values), "o", color=style[row]["color"], markersize=5)
            mean = sum(values) / len(values)
            axis.plot(mean, place, "|", color=style[row]["color"], markersize=16, markeredgewidth=2)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set(title=title, xlabel="of the training loss; a bar is the mean", xscale="log")
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def planes(rows: Rows, path: Path) -> None:
    """Contours of the loss in a plane, the first seed of each method, one colour scale for all."""
    shown = {row: cells[0]["landscape_2d"]["points"] for row, cells in rows.items() if "landscape_2d" in cells[0]}
    if not shown:
        return
    every = [math.log10(point["scores"]["loss"]) for points in shown.values() for point in points]
    low, high = min(every), max(every)
    levels = [low + (high - low) * k / LEVELS for k in range(LEVELS + 1)]
    figure, axes = grid(len(shown), min(4, len(shown)))
    contours = None
    for axis, (row, points) in zip(axes, shown.items(), strict=True):
        steps = sorted({point["setting"]["x"] for point in points})
        heights = [math.log10(point["scores"]["loss"]) for point in points]
        # x varies slowest in the points, and contourf wants a line of the picture for each y.
        lines = [heights[place :: len(steps)] for place in range(len(steps))]
        contours = axis.contourf(steps, steps, lines, levels=levels, cmap="viridis")
        axis.contour(steps, steps, lines, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        axis.plot(0, 0, "+", color="#c55a11", markersize=9)
        axis.set(title=row, aspect="equal", xlabel="step along d1", ylabel="step along d2")
    ticks = [fifth / 5 for fifth in range(math.ceil(5 * low), math.floor(5 * high) + 1)]
    figure.colorbar(contours, ax=axes, label="log10 of the training loss", shrink=0.8, ticks=ticks)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw() -> None:
    """Draw everything that was measured."""
    records = read_records()
    for budget in budgets(records):
        rows = rows_of(records, budget)
        label = "" if len(budgets(records)) == 1 else "_" + re.sub(r"[^\w.]+", "_", budget)

        def place(property_: str, label: str = label) -> Path:
            return PICTURES / f"robustness_{property_}{label}.png"

        curves(rows, metric_of(records), place)
        curvatures(rows, place("curvature"))
        planes(rows, place("landscape_2d"))
