"""Pictures of a run: bits per layer, bits and budget over time, clipping ranges against histograms.

Each function takes plain numbers and writes one PNG, dark on white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nipq.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHT, ACTIVATION, LINE = "#1f4e79", "#c55a11", "#444444"
STYLE = {
    "axes.edgecolor": LINE, "axes.labelcolor": "black", "axes.titlesize": 10, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120, "font.size": 9, "grid.color": "#dddddd",
    "legend.frameon": False, "text.color": "black", "xtick.color": "black", "ytick.color": "black",
}  # fmt: skip
STAGE_NAMES = {"float": "float", "search": "search\n(noise)", "finetune": "fine-tune\n(round)"}
#: Place of a legend beside its panel.
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
#: Layers that are named at one bit-width.
NAMED = 2
COLOURS = (WEIGHT, ACTIVATION, "#3a7d44", "#7b3f8c")


@dataclass(frozen=True)
class Histogram:
    """A tensor and the quantizer that it goes through.

    Attributes:
        title: name and kind of the tensor.
        values: some of its elements, any shape.
        low: lowest value that the quantizer can give.
        high: highest one.
        step: distance between its values.
        bits: its bit-width.
        is_weight: colour.
    """

    title: str
    values: np.ndarray
    low: float
    high: float
    step: float
    bits: int
    is_weight: bool


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in our style, saved at the end; drawn without a screen and without touching global state.

    Args:
        path: PNG to write.
        width: inches.
        height: inches.

    Yields:
        The empty figure.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    matplotlib = require("matplotlib", extra="report", purpose="plots")
    figures = require("matplotlib.figure", extra="report", purpose="plots")
    agg = require("matplotlib.backends.backend_agg", extra="report", purpose="plots")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained", facecolor="white")
        agg.FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plot_bits(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the final bits of each layer's weights and input, in model order.

    Args:
        layers: rows of the layer table: ``name``, ``weight_bits``, ``activation_bits`` (``None`` for a float input).
        path: PNG to write.
    """
    count = len(layers)
    with drawn(path, width=min(22.0, max(6.5, 1.8 + 0.3 * count)), height=4.6) as figure:
        axes: Axes = figure.subplots()
        places = np.arange(count)
        for offset, key, colour, label in (
            (-0.2, "weight_bits", WEIGHT, "weights"),
            (0.2, "activation_bits", ACTIVATION, "input activations"),
        ):
            known = [(place, row[key]) for place, row in zip(places, layers, strict=True) if row[key] is not None]
            axes.bar([p + offset for p, _ in known], [bits for _, bits in known], 0.4, color=colour, label=label)
        most = max(max(row["weight_bits"], row["activation_bits"] or 0) for row in layers)
        axes.set(ylabel="bit-width [bit]", xlim=(-0.8, count - 0.2), ylim=(0, most + 0.5), yticks=range(0, most + 1))
        axes.set_xticks(places, [row["name"] for row in layers], rotation=90, fontsize=8 if count <= 40 else 7)
        axes.grid(visible=False, axis="x")
        axes.set_title("Bit-width of each layer (no orange bar: the input stays float)", pad=22)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.995), ncols=2)


def plot_history(rows: Sequence[Mapping[str, Any]], path: Path, metric: str = "accuracy", unit: str = "%") -> None:
    """The task's metric, bit-widths and the cost relative to each limit, over the epochs of all stages.

    Args:
        rows: rows of the metrics file.
        path: PNG to write.
        metric: name of the metric.
        unit: its unit.
    """
    time = np.arange(1, len(rows) + 1)
    with drawn(path, width=8.0, height=7.5) as figure:
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        _curve(top, time, rows, f"train_{metric}", ACTIVATION, "training (with noise while searching)")
        _curve(top, time, rows, f"val_{metric}", WEIGHT, "validation (true quantizer)")
        top.set(ylabel=f"{metric} [{unit}]" if unit else metric)
        if unit == "%":
            low, high = top.get_ylim()
            top.set_ylim(max(low, 0.0), min(high, 100.0))
        top.set_title(metric[:1].upper() + metric[1:], pad=30)  # room for the names of the stages
        _layer_curves(middle, time, rows)
        _curve(middle, time, rows, "weight_bits", WEIGHT, "weights")
        _curve(middle, time, rows, "activation_bits", ACTIVATION, "activations")
        middle.set(ylabel="bit-width [bit]")
        middle.set_title("Averages (dots), layers (thin)", loc="left")
        names = list(dict.fromkeys(limit["name"] for row in rows for limit in row.get("limits", [])))
        for name, colour, style in zip(names, COLOURS, ("-", "--", "-.", ":"), strict=False):
            bottom.plot(time, [_share(row, name) for row in rows], style, color=colour, marker=".", label=name)
        bottom.axhline(100.0, color="black", linewidth=1.0, label="the budget")
        bottom.set(ylabel="cost / limit [%]", xlabel="epoch (all stages)", title="Cost relative to the budget")
        bottom.ticklabel_format(axis="y", useOffset=False)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        for axes in (top, middle, bottom):
            _mark_stages(axes, rows)
            if axes.get_legend_handles_labels()[0]:  # a run without a search has no bits to draw
                place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": 2} if axes is middle else BESIDE
                axes.legend(**place)
        _name_stages(top, rows)


def plot_ranges(histograms: Sequence[Histogram], path: Path) -> None:
    """Histograms of tensors with the range and the levels of their quantizers.

    Args:
        histograms: tensors to draw, one panel each.
        path: PNG to write.
    """
    columns = min(4, len(histograms))
    lines = -(-len(histograms) // columns)
    with drawn(path, width=3.4 * columns, height=2.7 * lines + 0.6) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, item in zip(panels, histograms, strict=False):
            colour = WEIGHT if item.is_weight else ACTIVATION
            values = item.values.astype(np.float64).flatten()
            edge = max(float(np.abs(values).max()), abs(item.low), abs(item.high)) * 1.05
            start = -edge if min(values.min(), item.low) < 0 else -0.03 * edge
            axes.hist(values, bins=80, range=(start, edge), color=colour, alpha=0.75)
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5)
            for end in {item.low, item.high}:
                axes.axvline(end, color="black", linewidth=1.3)
            levels = item.low + item.step * np.arange(round((item.high - item.low) / item.step) + 1)
            if len(levels) <= 40:
                bottom = axes.get_xaxis_transform()
                axes.plot(levels, np.full(len(levels), 0.02), "|", color="black", markersize=7, transform=bottom)
            axes.set_title(f"{_wrapped(item.title)}\n{item.bits} bit, step {item.step:.3g}", fontsize=8)
            axes.set(xlabel="value", xlim=(start, edge))
        for row in range(lines):
            panels[row * columns].set_ylabel("elements (log scale)")
        for axes in panels[len(histograms) :]:
            axes.set_visible(False)
        figure.suptitle(
            "Tensors and their learned clipping ranges (black lines; ticks are the quantizer's values)", fontsize=10
        )


def _curve(axes: Axes, time: np.ndarray, rows: Sequence[Mapping[str, Any]], key: str, colour: str, label: str) -> None:
    values = [row.get(key) for row in rows]
    if any(value is not None for value in values):
        style = "--" if colour == ACTIVATION else "-"  # so that equal curves are both seen
        known = [np.nan if value is None else value for value in values]
        axes.plot(time, known, style, color=colour, marker=".", label=label, clip_on=False)  # a dot at 100 % is whole


def _layer_curves(axes: Axes, time: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
    """The continuous bit-widths of every layer, faint, behind the averages; their names where the lines end."""
    names = {name: None for row in rows for name in row.get("layer_bits", {})}
    ends: dict[tuple[int, str], list[str]] = {}
    for name in names:
        pairs = [row.get("layer_bits", {}).get(name, (None, None)) for row in rows]
        for values, colour in zip(zip(*pairs, strict=True), (WEIGHT, ACTIVATION), strict=True):
            known = [np.nan if value is None else value for value in values]
            axes.plot(time, known, color=colour, linewidth=0.7, alpha=0.35, zorder=1)
            if last := [value for value in values if value is not None]:
                ends.setdefault((round(last[-1]), colour), []).append(name)
    for (bits, colour), those in ends.items():
        kind = "W" if colour == WEIGHT else "A"
        more = f" and {len(those) - NAMED} more" if len(those) > NAMED else ""
        axes.annotate(
            f"{kind}: {', '.join(_wrapped(name, 24) for name in those[:NAMED])}{more}", (1.01, bits),
            xycoords=("axes fraction", "data"), xytext=(0, 4 if colour == WEIGHT else -4), textcoords="offset points",
            color=colour, fontsize=6.5, va="center",
        )  # fmt: skip


def _share(row: Mapping[str, Any], name: str) -> float:
    for limit in row.get("limits", []):
        if limit["name"] == name:
            return 100.0 * float(limit["rounded"]) / float(limit["target"])
    return float("nan")


def _borders(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    stages = [row["stage"] for row in rows]
    return [(i, stage) for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage]


def _mark_stages(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for start, _ in _borders(rows)[1:]:
        axes.axvline(start + 0.5, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))


def _name_stages(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    borders = [*_borders(rows), (len(rows), "")]
    for (start, stage), (end, _) in pairwise(borders):
        axes.text(
            (start + end + 1) / 2, 1.02, STAGE_NAMES[stage], ha="center", va="bottom", fontsize=8,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _wrapped(title: str, width: int = 34) -> str:
    return title if len(title) <= width else title[: width - 12] + "..." + title[-9:]
