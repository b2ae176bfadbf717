"""Pictures: the training step of every variant and of every method, and what an element costs.

python -m benchmarks.plots        # writes speed_*.png into docs/results/pictures
"""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import record
from experiments.shown import PICTURES

INK, OURS, OTHERS, BASE = "#222222", "#c55a11", "#5b7fa6", "#808080"
FORWARD, BACKWARD = "#1f4e79", "#c55a11"
Record = dict[str, Any]


def training_step(content: Record) -> None:
    """A panel for each network: seconds of a step in units of float's, in the better memory format of each variant."""
    networks = list(content["networks"].values())
    figure, axes = plt.subplots(1, len(networks), figsize=(4.2 * len(networks), 3.6), sharey=True, layout="constrained")
    for axis, network in zip([axes] if len(networks) == 1 else axes, networks, strict=True):
        rows = next(iter(network["threads"].values()))
        names = list(rows)
        found = [
            min((cell["ratio"] for cell in row.values()), key=lambda cell: float(cell[1])) for row in rows.values()
        ]
        low, high = ([abs(cell[1] - cell[end]) for cell in found] for end in (0, 2))
        colours = [BASE if name == "float" else OURS if name.startswith("nipq") else OTHERS for name in names]
        bars = axis.barh(names, [cell[1] for cell in found], xerr=[low, high], color=colours, ecolor=INK, height=0.7)
        axis.bar_label(bars, [f" {cell[1]:.2f}" for cell in found], color=INK, fontsize=8)
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.set_xlim(0, 1.2 * max(cell[2] for cell in found))
        axis.set_title(network["shown"], color=INK)
        axis.set_xlabel("CPU time of a step, one thread [float step]", color=INK)
    axis.invert_yaxis()
    _save(figure, "training_step")


def methods(content: Record) -> None:
    """Seconds of a step of every method in units of float's, with the quartiles over rounds."""
    rows = content["rows"]
    found = [row["ratio"] for row in rows.values()]
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.3 * len(rows)), layout="constrained")
    errors = [[abs(ratio[1] - ratio[end]) for ratio in found] for end in (0, 2)]
    colours = [BASE if name == "float" else OURS if name == "nipq" else OTHERS for name in rows]
    bars = axis.barh(list(rows), [ratio[1] for ratio in found], xerr=errors, color=colours, ecolor=INK, height=0.7)
    axis.bar_label(bars, [f" {ratio[1]:.2f}" for ratio in found], color=INK, fontsize=8)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_xlim(0, 1.12 * max(ratio[2] for ratio in found))
    axis.set_xlabel("CPU time of a training step, one thread [float step]", color=INK)
    axis.invert_yaxis()
    _save(figure, "methods")


def _best(row: Record) -> list[float]:
    """Quartiles in the memory format with the lowest median."""
    return min((cell["ratio"] for cell in row.values()), key=lambda quartiles: float(quartiles[1]))


def elements(content: Record) -> None:
    """Nanoseconds an element of the largest float32 tensor on one thread, forward and backward, on a log scale."""
    cases = [case for case in content["cases"] if case["dtype"] == "float32" and case["threads"] == 1]
    case = max(cases, key=lambda case: case["elements"])
    bars = {"copy + add": (case["limit"]["copy"][1], case["limit"]["add"][1])}
    bars |= {name: (row["forward"][1], row["backward"][1]) for name, row in case["rows"].items()}
    names = sorted(bars, key=lambda name: sum(bars[name]))
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    places = range(len(names))
    for shift, colour, label, part in ((-0.2, FORWARD, "forward", 0), (0.2, BACKWARD, "backward", 1)):
        drawn = axis.barh([place + shift for place in places], [bars[name][part] for name in names], 0.38,
                          color=colour, label=label)  # fmt: skip
        axis.bar_label(drawn, [f" {bars[name][part]:.3g}" for name in names], color=INK, fontsize=8)
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=2.5 * max(max(pair) for pair in bars.values()))
    axis.set_xlabel(f"time of an element [ns], {case['elements']:,} elements of float32, one thread", color=INK)
    axis.legend(frameon=False, loc="upper right")
    _save(figure, "elements")


def _save(figure: Any, name: str) -> None:  # noqa: ANN401 -- matplotlib's Figure
    for axis in figure.axes:
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / f"speed_{name}.png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw what was measured."""
    for name, draw in (("training_step", training_step), ("methods", methods), ("elements", elements)):
        content = record.read(name)
        if content is not None:
            draw(content)


if __name__ == "__main__":
    main()
