"""Pictures of a comparison: every row's score with its interval, and the score against what the model costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nipq.train.compare_table import PREFIXES, Block, Comparison, Row
from nipq.train.plots import ACTIVATION, LINE, WEIGHT, drawn

COLOURS = (
    "#1f4e79", "#3a7d44", "#7b3f8c", "#8c6d1f", "#117a7a", "#a1243b", "#4d4d4d", "#5a6fbf", "#6b8e23",
    "#e377c2", "#00a0c6", "#d4a017", "#2f2f8f",
)  # fmt: skip
#: Colour of the baseline.
STRONG = ACTIVATION
MARKERS = "sD^vP*Xh<>pH8"
#: Share of the axis within which rows of one budget count as costing the same, and are drawn side by side.
SAME = 0.03
#: Share of the axis by which such rows are drawn apart.
APART = 0.014
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
                half = 0.0 if row.score.half is None else row.score.half
                at = labels.index(row.label)
                axes.errorbar(row.score.mean, at, xerr=half, color=colour, marker="o", markersize=5, capsize=3)
            _float_line(axes.axvline, comparison)
            axes.set_xlim(*_limits(comparison, [block]))
            axes.set_title(f"budget {block.budget}", fontsize=9)
            axes.set_xlabel(f"test {comparison.metric.title}")
        figure.axes[0].set_yticks(range(len(labels)), labels)
        figure.axes[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.suptitle(f"{comparison.name}: {_shown(comparison)}; dashed: float", fontsize=10)
    return path


def plot_against_cost(comparison: Comparison, heading: str, unit: str, place: Place, path: Path) -> Path:
    """The score against a cost, a line for each row; rows that cost the same are drawn side by side."""
    labels = _labels(comparison)
    costs = [x for block in comparison.blocks for row in block.rows if (x := place(row)) is not None]
    factor, letter = next((pair for pair in PREFIXES if max(costs) >= pair[0]), (1.0, ""))
    span = max(max(costs) - min(costs), 0.1 * max(costs)) / factor
    points: dict[str, list[tuple[float, float, float]]] = {label: [] for label in labels}
    moved = False
    for block in comparison.blocks:
        found = [(x / factor, row) for row in block.rows if (x := place(row)) is not None]
        apart = _side_by_side(found, span)
        moved |= {x for x, _ in apart} != {x for x, _ in found}
        for x, row in apart:
            points[row.label].append((x, row.score.mean, row.score.half or 0.0))
    with drawn(path, width=7.4, height=4.2) as figure:
        axes = figure.subplots()
        colours = iter(COLOURS * (1 + len(labels) // len(COLOURS)))
        markers = iter(MARKERS * (1 + len(labels) // len(MARKERS)))
        for label in labels:
            strong = label == comparison.baseline
            xs, means, halves = zip(*sorted(points[label]), strict=True) if points[label] else ((), (), ())
            axes.errorbar(
                xs, means, yerr=halves,
                color=STRONG if strong else next(colours), marker="o" if strong else next(markers),
                markersize=6 if strong else 4.5, linewidth=2.0 if strong else 0.9, elinewidth=0.8, capsize=2,
                alpha=1.0 if strong else 0.85, label=label, zorder=3 if strong else 2,
            )  # fmt: skip
        _float_line(axes.axhline, comparison)
        axes.set_ylim(*_limits(comparison, comparison.blocks))
        beside = "; rows of equal cost side by side" if moved else ""
        axes.set(xlabel=f"{heading} [{letter}{unit}]{beside}", ylabel=f"test {comparison.metric.title}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(f"{comparison.name}: {_shown(comparison)}; dashed: float", fontsize=10)
    return path


def _side_by_side(found: Sequence[tuple[float, Row]], span: float) -> list[tuple[float, Row]]:
    """Places of the rows of one budget: those within ``SAME`` of each other's are spread around their middle."""
    groups: list[list[tuple[float, Row]]] = []
    for x, row in sorted(found, key=lambda pair: pair[0]):
        if groups and x - groups[-1][0][0] < SAME * span:
            groups[-1].append((x, row))
        else:
            groups.append([(x, row)])
    return [
        (sum(x for x, _ in group) / len(group) + APART * span * (number - (len(group) - 1) / 2), row)
        if len(group) > 1
        else (group[0][0], row)
        for group in groups
        for number, (_, row) in enumerate(sorted(group, key=lambda pair: pair[1].label))
    ]


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
    several = any(len(row.seeds) > 1 for block in comparison.blocks for row in block.rows)
    return f"{'mean and 95 % interval over seeds' if several else 'one seed'}, {direction} is better"


def _labels(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.label for block in comparison.blocks for row in block.rows))
