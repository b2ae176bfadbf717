"""Pictures of comparisons: all markers can be seen, no axis says more than there can be, one seed is said to be one."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nipq.train.compare_plots import plot_comparison
from nipq.train.compare_table import Block, Comparison, Estimate, Metric, Row


def row(label: str, score: float, half: float | None, cost: float) -> Row:
    return Row(
        label=label, seeds=(0,) if half is None else (0, 1), complete=True, state="finetuned",
        score=Estimate(score, half, 1 if half is None else 2), to_float=None, behind=None, weight_bits=4.0,
        activation_bits=4.0, bops=cost, file_bytes=cost, verified=1, seconds_per_step=None, cost=None,
    )  # fmt: skip


def comparison(rows: list[Row], metric: Metric) -> Comparison:
    return Comparison("grid", metric, rows[0].label, None, (Block("4/4", tuple(rows), None),), ())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _path: found.append(figure))
    return found


@pytest.fixture
def accuracy() -> Metric:
    return Metric("accuracy", "%", True)


def drawn_markers(figure: Figure) -> list[tuple[float, float, float]]:
    """Centre and size in pixels of every marker with data."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    return [
        (x, y, line.get_markersize() * figure.dpi / 72)
        for container in axes.containers
        for line in [container.lines[0]]
        for x, y in axes.transData.transform(line.get_xydata()).tolist()
    ]


@pytest.mark.parametrize("half", [None, 0.5])
@pytest.mark.parametrize("unit", ["bops", "bytes"])
def test_fourteen_rows_of_one_cost_and_nearly_one_score_are_all_seen(
    half: float | None, unit: str, figures: list[Figure], accuracy: Metric, tmp_path: Path
) -> None:
    rows = [row(f"row {i}", 90.0 + 0.01 * (i % 3), half, 2e6) for i in range(14)]
    plot_comparison(comparison(rows, accuracy), tmp_path)
    figure = figures[1 if unit == "bops" else 2]
    marks = drawn_markers(figure)
    assert len(marks) == 14
    box = figure.axes[0].bbox
    assert all(box.x0 <= x - size / 2 and x + size / 2 <= box.x1 for x, _, size in marks)
    for (x, y, size), (other_x, other_y, other) in combinations(marks, 2):
        assert max(abs(x - other_x), abs(y - other_y)) >= (size + other) / 2
    looks = {(line.get_color(), line.get_marker()) for line in figure.legends[0].get_lines()}
    assert len(looks) == 14


def test_rows_that_lie_apart_stay_where_they_are(figures: list[Figure], accuracy: Metric, tmp_path: Path) -> None:
    rows = [row("ours", 90.0, None, 2e6), row("theirs", 80.0, None, 2e6), row("more", 90.0, None, 4e6)]
    plot_comparison(comparison(rows, accuracy), tmp_path)
    costs = [container.lines[0].get_xdata()[0] for container in figures[1].axes[0].containers]
    assert costs == [2.0, 2.0, 4.0]
    assert "side by side" not in figures[1].axes[0].get_xlabel()


@pytest.mark.parametrize("half", [None, 3.0])
def test_no_axis_of_accuracy_ends_above_100(
    half: float | None, figures: list[Figure], accuracy: Metric, tmp_path: Path
) -> None:
    plot_comparison(comparison([row("a", 99.5, half, 1e6), row("b", 80.0, half, 2e6)], accuracy), tmp_path)
    assert figures[0].axes[0].get_xlim()[1] <= 100.0
    assert figures[1].axes[0].get_ylim()[1] <= 100.0


def test_one_seed_is_hollow_and_said(figures: list[Figure], accuracy: Metric, tmp_path: Path) -> None:
    def faces(figure: Figure) -> list[Any]:
        return [container.lines[0].get_markerfacecolor() for container in figure.axes[0].containers]

    plot_comparison(comparison([row("a", 90.0, None, 1e6), row("b", 80.0, 1.0, 2e6)], accuracy), tmp_path)
    for figure in figures:
        assert [face == "white" for face in faces(figure)] == [True, False]
        assert "hollow: one seed" in figure.get_suptitle()
    plot_comparison(comparison([row("a", 90.0, None, 1e6)], accuracy), tmp_path)
    assert "one seed, so no spread" in figures[-1].get_suptitle()
