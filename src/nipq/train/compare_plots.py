"""Pictures of a comparison: every row's score with its interval, and the score against what the model costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nipq.train.compare_table import PREFIXES, Block, Comparison, Row
from nipq.train.plots import ACTIVATION, LINE, WEIGHT, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#1f4e79", "#3a7d44", "#7b3f8c", "#8c6d1f", "#117a7a", "#a1243b", "#4d4d4d", "#5a6fbf", "#6b8e23",
    "#e377c2", "#00a0c6", "#d4a017", "#2f2f8f",
)  # fmt: skip
#: Colour of the baseline.
STRONG = ACTIVATION
MARKERS = "sD^vP*Xh<>pH8"
#: Pixels between two intervals that lie side by side.
BARS = 5.0
#: Room around the means, as a share of their range. Intervals may be cut by the axis: two seeds can span everything.
ROOM = 0.15

Place = Callable[[Row], float | None]


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all pictures of a comparison.

    Args:
        comparison: the table.
        folder: place of the PNG files.

    Returns:
        The files.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    name = comparison.metric.name
    found = [plot_scores(comparison, folder / f"{name}.png")]
    costs: list[tuple[str, str, Place]] = [
        ("bit-operations per sample", "BOP", lambda row: row.bops),
        ("bytes on disk", "B", lambda row: row.file_bytes),
    ]
    for heading, unit, place in costs:
        if any(place(row) is not None for block in comparison.blocks for row in block.rows):
            path = folder / f"{name}_against_{'bops' if unit == 'BOP' else 'bytes'}.png"
            found.append(plot_against_cost(comparison, heading, unit, place, path))
    return found


def plot_scores(comparison: Comparison, path: Path) -> Path:
    """A panel for each budget, a line for each row in the grid's order: mean, 95 % interval, float as a dashed line."""
    labels = _labels(comparison)
    count = len(comparison.blocks)
    with drawn(path, width=2.0 + 3.0 * count, height=1.3 + 0.26 * len(labels)) as figure:
        for axes, block in zip(
            figure.subplots(1, count, squeeze=False, sharey=True)[0], comparison.blocks, strict=True
        ):
            for row in block.rows:
                colour = STRONG if row.label == comparison.baseline else WEIGHT
                axes.errorbar(
                    row.score.mean, labels.index(row.label), xerr=row.score.half or 0.0, color=colour,
                    marker="o", markersize=5, markerfacecolor=_fill(row, colour), capsize=3 if row.score.half else 0,
                )  # fmt: skip
            _float_line(axes.axvline, comparison)
            axes.set_xlim(*_limits(comparison, [block]))
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.set_title(f"budget {block.budget}", fontsize=9)
            axes.set_xlabel(f"test {comparison.metric.title}")
        figure.axes[0].set_yticks(range(len(labels)), labels)
        figure.axes[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.suptitle(f"{comparison.name}\n{_shown(comparison)}; dashed: float", fontsize=9)
    return path


def plot_against_cost(comparison: Comparison, heading: str, unit: str, place: Place, path: Path) -> Path:
    """The score against a cost, a line for each row; markers that would cover each other are moved aside."""
    labels = _labels(comparison)
    found = [(x, row) for block in comparison.blocks for row in block.rows if (x := place(row)) is not None]
    most = max(x for x, _ in found)
    factor, letter = next((pair for pair in PREFIXES if most >= pair[0]), (1.0, ""))
    least = min(x for x, _ in found)
    room = max(0.1 * (most - least), 0.02 * most)
    with drawn(path, width=7.4, height=max(4.2, 0.7 + 0.21 * len(labels))) as figure:
        axes = figure.subplots()
        axes.set_ylim(*_limits(comparison, comparison.blocks))
        axes.set_xlim((least - room) / factor, (most + room) / factor)
        axes.ticklabel_format(useOffset=False)
        axes.set(xlabel=f"{heading} [{letter}{unit}]", ylabel=f"test {comparison.metric.title}")
        _float_line(axes.axhline, comparison)
        looks = _looks(comparison, labels)
        handles = [axes.plot([], [], label=label, **looks[label])[0] for label in labels]
        figure.legend(handles=handles, loc="outside right center")
        figure.suptitle(f"{comparison.name}\n{_shown(comparison)}; dashed: float", fontsize=9)
        found.sort(key=lambda pair: pair[1].label != comparison.baseline)  # stable: the baseline stays where it is
        true = [x / factor for x, _ in found]
        places = _apart(axes, true, [row for _, row in found], [looks[row.label]["markersize"] for _, row in found])
        if places != true:
            axes.set_xlabel(f"{axes.get_xlabel()}; equal ones side by side")
        points: dict[str, list[tuple[float, Row]]] = {label: [] for label in labels}
        for x, (_, row) in zip(places, found, strict=True):
            points[row.label].append((x, row))
        for label, those in points.items():
            those.sort(key=lambda pair: pair[0])
            xs, means = [x for x, _ in those], [row.score.mean for _, row in those]
            axes.errorbar(
                xs, means, yerr=[row.score.half or 0.0 for _, row in those], elinewidth=0.8, capsize=2,
                zorder=3 if label == comparison.baseline else 2, **looks[label],
            )  # fmt: skip
    return path


def _looks(comparison: Comparison, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each row; no two rows have both colour and marker in common."""
    single = {row.label for block in comparison.blocks for row in block.rows if row.score.half is None}
    found: dict[str, dict[str, Any]] = {}
    others = [label for label in labels if label != comparison.baseline]
    for number, label in enumerate(others):
        turn, place = divmod(number, len(COLOURS))
        look = {"color": COLOURS[place], "marker": MARKERS[(place + turn) % len(MARKERS)]}
        found[label] = look | {"markersize": 4.5, "linewidth": 0.9, "alpha": 0.85}
    found[comparison.baseline] = {"color": STRONG, "marker": "o", "markersize": 6.0, "linewidth": 2.0}
    for label in single & set(found):
        found[label]["markerfacecolor"] = "white"
    return found


def _fill(row: Row, colour: str) -> str:
    """Markers without an interval are hollow: one seed says nothing about a difference."""
    return "white" if row.score.half is None else colour


def _apart(axes: Axes, costs: Sequence[float], rows: Sequence[Row], sizes: Sequence[float]) -> list[float]:
    """Costs at which rows are drawn, so that no marker covers another one; the axis grows until it holds them."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    while True:
        figure.draw_without_rendering()  # the layout says how large the axes are
        scale = axes.bbox.width / np.ptp(axes.get_xlim()), axes.bbox.height / np.ptp(axes.get_ylim())
        marks = [
            Mark(
                x * scale[0], row.score.mean * scale[1], (row.score.half or 0.0) * scale[1],
                size * figure.dpi / 72 + 2,
            )
            for x, row, size in zip(costs, rows, sizes, strict=True)
        ]  # fmt: skip
        moved = [x + move / scale[0] for x, move in zip(costs, side_by_side(marks), strict=True)]
        low, high = axes.get_xlim()
        room = 0.04 * (high - low)
        if low + room <= min(moved) and max(moved) <= high - room:
            return moved
        axes.set_xlim(min(low, min(moved) - 2 * room), max(high, max(moved) + 2 * room))


class Mark(NamedTuple):
    """A marker with its interval, in pixels.

    Attributes:
        x: of its centre.
        y: of its centre.
        half: half-width of the interval.
        size: width and height of the marker.
    """

    x: float
    y: float
    half: float
    size: float


def side_by_side(marks: Sequence[Mark]) -> list[float]:
    """Moves to the side, no further than it takes to keep each marker and interval apart from those before it.

    Args:
        marks: the first ones move least.

    Example:
        >>> side_by_side([Mark(0, 0, 0, 6), Mark(1, 0, 0, 6), Mark(0, 9, 0, 6)])
        [0.0, 5.0, 0.0]
    """
    moves: list[float] = []
    for mark in marks:
        near: list[tuple[float, float]] = []
        for other, move in zip(marks, moves, strict=False):
            reach, distance = (mark.size + other.size) / 2, abs(mark.y - other.y)
            if distance < reach:
                near.append((other.x + move, reach))
            elif distance < max(mark.half, reach / 2) + max(other.half, reach / 2):
                near.append((other.x + move, BARS))
        candidates = [0.0, *(x + sign * reach - mark.x for x, reach in near for sign in (1, -1))]
        free = [move for move in candidates if all(abs(mark.x + move - x) >= reach - 1e-6 for x, reach in near)]
        moves.append(min(free, key=abs))
    return moves


def _limits(comparison: Comparison, blocks: Sequence[Block]) -> tuple[float, float]:
    """Ends of the metric's axis: the means of these blocks and of float with some room; a share ends at 100 %."""
    means = [row.score.mean for block in blocks for row in block.rows]
    means += [comparison.float_row.score.mean] if comparison.float_row else []
    room = ROOM * (max(means) - min(means)) or 0.01 * abs(means[0]) or 1.0
    low, high = min(means) - room, max(means) + room
    return (max(low, 0.0), min(high, 100.0)) if comparison.metric.unit == "%" else (low, high)


def _float_line(draw: Callable[..., object], comparison: Comparison) -> None:
    if comparison.float_row:
        draw(comparison.float_row.score.mean, color=LINE, linestyle="--", linewidth=1.0, zorder=1)


def _shown(comparison: Comparison) -> str:
    direction = "higher" if comparison.metric.higher_is_better else "lower"
    single = {row.score.half is None for block in comparison.blocks for row in block.rows}
    spread = "mean and 95 % interval over seeds" if False in single else "one seed, so no spread"
    hollow = "; hollow: one seed" if len(single) == 2 else ""
    return f"{spread}, {direction} is better{hollow}"


def _labels(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.label for block in comparison.blocks for row in block.rows))
