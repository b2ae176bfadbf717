"""Pictures of a comparison: the metric against what a model costs, and what a method costs in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nipq.compare.table import Comparison, Row
from nipq.train.plots import LINE, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#c55a11", "#1f4e79", "#3a7d44", "#7b3f8c", "#8c6d1f", "#117a7a", "#a1243b", "#4d4d4d", "#5a6fbf", "#6b8e23",
    "#e377c2", "#00a0c6", "#d4a017", "#2f2f8f",
)  # fmt: skip
MARKERS = "osD^vP*Xh<>pH8"
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

APART = 0.008
"""Share of the axis by which rows are drawn apart where all of a budget have the same bits, so that all are seen."""
SAME = 0.02
"""Share of the axis within which rows count as having the same."""
SHORTEST = 1.0
"""Bits that such an axis spans at least; else rows of one budget would be told apart by their fourth decimal."""
SHORTEST_SHARE = 0.1
"""The same for other axes, as a share of their smallest value."""

Place = Callable[[Row], float | None]


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all pictures of a comparison.

    Args:
        comparison: The table.
        folder: Where the PNG files go.

    Returns:
        The files.

    Raises:
        MissingDependencyError: Without matplotlib.
    """
    metric, found = comparison.metric.name, []
    sides: list[tuple[str, Place]] = [
        ("average weight bits [bit]", lambda row: row.weight_bits),
        ("average activation bits [bit]", lambda row: row.activation_bits),
    ]
    for name, panels in (
        ("bits", sides),
        ("bops", [_scaled(comparison, "bit-operations per sample", "BOP", lambda row: row.bops)]),
        ("bytes", [_scaled(comparison, "bytes on disk", "B", lambda row: row.file_bytes)]),
    ):
        shown = [panel for panel in panels if any(panel[1](row) is not None for row in _rows(comparison))]
        if shown:
            found.append(folder / f"{metric}_against_{name}.png")
            _plot_curves(comparison, shown, found[-1])
    if any(row.cost is not None for row in _rows(comparison)):
        found.append(folder / "training_cost.png")
        _plot_cost(comparison, found[-1])
    return found


def _plot_curves(comparison: Comparison, panels: Sequence[tuple[str, Place]], path: Path) -> None:
    """One line per row with the 95 % interval of its mean; float as a dashed line.

    Where the rows of every budget have the same place they are drawn side by side around the baseline, which is where
    it is, on a thin line; elsewhere each is where it is.
    """
    metric, labels = comparison.metric, _labels(comparison)
    arrow = "higher" if metric.higher_is_better else "lower"
    with drawn(path, width=2.2 + 4.4 * len(panels), height=4.2) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        grid[0].set_ylabel(f"test {metric.title}, {arrow} is better")
        for axes, (heading, place) in zip(grid, panels, strict=True):
            places = [x for row in _rows(comparison) if (x := place(row)) is not None]
            low, span = min(places), max(places) - min(places)
            shortest = max(SHORTEST_SHARE * low, SHORTEST if "[bit]" in heading else 0.0)
            if span < shortest:
                low, span = low - (shortest - span) / 2, shortest
                axes.set_xlim(low, low + span)
            budgets = [[x for row in block.rows if (x := place(row)) is not None] for block in comparison.blocks]
            together = all(max(xs) - min(xs) < SAME * span for xs in budgets if xs)
            shifts = _shifts(labels, comparison.baseline, APART * span if together else 0.0)
            for number, label in enumerate(labels):
                _curve(axes, comparison, label, number, place, shifts[label])
            for row in _rows(comparison) if together else []:
                if row.label == comparison.baseline and (x := place(row)) is not None:
                    axes.axvline(x, color=LINE, linewidth=0.6, zorder=1.6)
            if comparison.float_row:
                level = comparison.float_row.score.mean
                axes.axhline(level, color=LINE, linestyle="--", linewidth=1.2, label=f"float, {level:.4g}", zorder=1)
            axes.set_xlabel(f"{heading}, rows side by side" if together else heading)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center")
        repeated = any(len(row.seeds) > 1 for row in _rows(comparison))
        shown = "mean and 95 % interval over seeds" if repeated else "one seed"
        figure.suptitle(f"{comparison.name}: {shown}", fontsize=10)


def _shifts(labels: Sequence[str], baseline: str, step: float) -> dict[str, float]:
    """How far beside its place each row is drawn: the baseline not at all, the others in turn right and left of it."""
    others = [label for label in labels if label != baseline]
    return {baseline: 0.0} | {
        label: step * (1 + number // 2) * (-1 if number % 2 else 1) for number, label in enumerate(others)
    }


def _curve(axes: Axes, comparison: Comparison, label: str, number: int, place: Place, shift: float) -> None:
    found = [(x, row.score) for row in _rows(comparison) if row.label == label and (x := place(row)) is not None]
    found.sort(key=lambda point: point[0])
    strong = label == comparison.baseline
    axes.errorbar(
        [x + shift for x, _ in found],
        [score.mean for _, score in found],
        yerr=[score.half or 0.0 for _, score in found],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=6 if strong else 4.5,
        linewidth=2.0 if strong else 1.1,
        elinewidth=1.0,
        capsize=3,
        label=label,
        zorder=3 if strong else 2,
    )


def _plot_cost(comparison: Comparison, path: Path) -> None:
    """Bars of the seconds of a training step over those of float training, the mean over budgets."""
    labels = _labels(comparison)
    costs = []
    for label in labels:
        known = [row.cost for row in _rows(comparison) if row.label == label and row.cost is not None]
        costs.append(sum(known) / len(known) if known else 0.0)
    with drawn(path, width=6.4, height=1.4 + 0.32 * len(labels)) as figure:
        axes = figure.subplots()
        bars = axes.barh(labels, costs, color=[COLOURS[i % len(COLOURS)] for i in range(len(labels))], height=0.7)
        axes.bar_label(bars, labels=[f"{cost:.2f}" if cost else "not measured" for cost in costs], padding=3)
        axes.axvline(1.0, color=LINE, linestyle="--", linewidth=1.2)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="seconds of a training step, as a multiple of float training (dashed)")
        axes.set_xlim(0, 1.12 * max([1.0, *costs]))
        axes.set_title(f"{comparison.name}: training cost", fontsize=10)


def _rows(comparison: Comparison) -> list[Row]:
    return [row for block in comparison.blocks for row in block.rows]


def _labels(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.label for row in _rows(comparison)))


def _scaled(comparison: Comparison, heading: str, unit: str, place: Place) -> tuple[str, Place]:
    """The heading with a prefix that suits the largest number, and the numbers in that unit."""
    most = max((value for row in _rows(comparison) if (value := place(row)) is not None), default=0.0)
    factor, letter = next((pair for pair in PREFIXES if most >= pair[0]), PREFIXES[-1])

    def scaled(row: Row) -> float | None:
        value = place(row)
        return None if value is None else value / factor

    return f"{heading} [{letter}{unit}]", scaled
