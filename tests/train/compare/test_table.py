"""The numbers of the table against hand-computed ones."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from nipq.errors import ConfigError
from nipq.train.compare import Grid, expand
from nipq.train.compare_table import (
    Comparison,
    Estimate,
    compare,
    headings,
    markdown,
    notes,
    prefixed,
    printed_parts,
    tabulate,
    verdict_line,
)

MakeGrid = Callable[..., Grid]
Record = Callable[..., dict[str, Any]]
Table = Callable[..., Comparison]
PSNR = {"name": "loss-like", "unit": "dB", "higher_is_better": False}


@pytest.fixture
def table(record: Record) -> Table:
    """A comparison at one budget, 4/4, of rows given by their scores of seeds 0, 1, ...; None is a missing cell."""

    def make(grid: Grid, scores: dict[str, list[float | None]], **settings: Any) -> Comparison:
        records = [
            record(row, None if row == "float" else "4/4", seed, value, **settings)
            for row, values in scores.items()
            for seed, value in enumerate(values)
            if value is not None
        ]
        return tabulate(grid, records)

    return make


def test_interval_is_students() -> None:
    values = [90.0, 91.0, 93.0]
    found = Estimate.of(values)
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-12)
    # By hand: deviations -4/3, -1/3, 5/3; variance 7/3; t(0.975, 2) = 4.30265.
    assert found.half == pytest.approx(4.30265 * math.sqrt(7 / 3 / 3), rel=1e-5)
    assert Estimate.of([5.0]) == Estimate(5.0, None, 1)


def test_differences_are_paired_by_seed(make_grid: MakeGrid, table: Table) -> None:
    # Seeds differ by tens of points, methods by one: only pairing can see it.
    found = table(make_grid(), {"float": [50, 70, 90], "ours": [49, 70, 88], "rival": [48, 68.5, 87.5]})
    ours, rival = found.blocks[0].rows
    assert ours.to_float == Estimate.of([-1.0, 0.0, -2.0])
    assert rival.behind == Estimate.of([1, 1.5, 0.5])
    assert ours.behind is None
    verdict = found.blocks[0].verdict
    assert verdict is not None
    expected = stats.ttest_rel([49, 70, 88], [48, 68.5, 87.5]).confidence_interval(0.95)
    half = verdict.difference.half
    assert half is not None
    assert (verdict.difference.mean - half, verdict.difference.mean + half) == pytest.approx(tuple(expected))
    assert verdict.outcome == ("better" if expected.low > 0 else "open")


@pytest.mark.parametrize(
    ("rival", "outcome"), [([80.1, 81, 82], "better"), ([92.1, 93, 94], "worse"), ([89, 92, 91], "open")]
)
def test_the_verdict_needs_an_interval_without_zero(
    rival: list[float], outcome: str, make_grid: MakeGrid, table: Table
) -> None:
    verdict = table(make_grid(), {"ours": [90.0, 91.0, 92.0], "rival": rival}).blocks[0].verdict
    assert verdict is not None
    assert verdict.outcome == outcome


def test_where_lower_is_better_the_best_other_method_is_the_lowest(make_grid: MakeGrid, table: Table) -> None:
    grid = make_grid(methods=dict.fromkeys(("ours", "a", "b"), "nipq"))
    found = table(grid, {"ours": [1.0, 1.1], "a": [2.0, 2.11], "b": [1.5, 1.61]}, metric=PSNR)
    verdict = found.blocks[0].verdict
    assert verdict is not None
    assert (verdict.other, verdict.outcome) == ("b", "better")
    assert verdict.difference.mean == pytest.approx(-0.505)
    assert "lower is better" in " ".join(notes(found))
    higher = table(grid, {"ours": [1.0, 1.1], "a": [2.0, 2.11], "b": [1.5, 1.61]})
    assert higher.blocks[0].verdict is not None
    assert (higher.blocks[0].verdict.other, higher.blocks[0].verdict.outcome) == ("a", "worse")


def test_missing_seeds_are_marked_and_left_out_of_pairs(make_grid: MakeGrid, table: Table) -> None:
    found = table(make_grid(), {"float": [90, 90, 90], "ours": [80, 81, 85], "rival": [79, None, 81]})
    ours, rival = found.blocks[0].rows
    assert (ours.complete, rival.complete) == (True, False)
    assert rival.seeds == (0, 2)
    assert rival.behind == Estimate.of([1, 4])
    assert "rival *" in markdown(found)
    assert "fewer seeds" in markdown(found)
    assert "fewer seeds" not in markdown(table(make_grid(), {"ours": [80, 81], "rival": [79, 80]}))


def test_a_method_with_fewer_seeds_is_not_the_best_because_of_it(make_grid: MakeGrid, table: Table) -> None:
    grid = make_grid(methods=dict.fromkeys(("ours", "all", "one"), "nipq"))
    found = table(grid, {"ours": [80, 81, 82], "all": [79, 80, 80], "one": [None, None, 95]})
    assert found.blocks[0].verdict is not None
    assert found.blocks[0].verdict.other == "all"


def test_named_rows_only(make_grid: MakeGrid, table: Table) -> None:
    grid = make_grid(methods=dict.fromkeys(("ours", "variant", "rival"), "nipq"), against=["rival"])
    verdict = table(grid, {"ours": [80, 81], "variant": [85, 86], "rival": [70, 72]}).blocks[0].verdict
    assert verdict is not None
    assert verdict.other == "rival"
    assert table(grid, {"ours": [80, 81], "variant": [85, 86]}).blocks[0].verdict is None


def test_the_last_state_counts_not_the_best(make_grid: MakeGrid, record: Record) -> None:
    worse = record("ours", "4/4", 0, 70.0)
    worse["results"]["states"]["frozen"]["test"]["accuracy"] = 95.0
    unfinished = record("rival", "4/4", 0, 60.0, state="bn")
    found = tabulate(make_grid(), [worse, unfinished])
    assert [(row.score.mean, row.state) for row in found.blocks[0].rows] == [(70.0, "finetuned"), (60.0, "bn")]
    assert "Last states: bn: rival; finetuned: ours." in notes(found)


def test_a_float_cell_counts_before_rounding(make_grid: MakeGrid, record: Record) -> None:
    start = record("float", None, 0, 91.0)
    start["results"]["states"]["bn"] = {"test": {"accuracy": 40.0}}
    found = tabulate(make_grid(), [start])
    assert found.float_row is not None
    assert (found.float_row.score.mean, found.float_row.file_bytes) == (91.0, 32000.0)


def test_costs_are_means_and_training_cost_is_relative_to_float(make_grid: MakeGrid, record: Record) -> None:
    records = [record("float", None, seed, 90) for seed in (0, 1)]
    for seed, (bops, seconds) in enumerate([(2e6, 0.2), (4e6, 0.4)]):
        settings = {"bops": bops, "seconds": seconds, "size": 1000 + seed, "verified": seed == 0}
        records.append(record("ours", "4/4", seed, 89, **settings))
    row = tabulate(make_grid(), records).blocks[0].rows[0]
    assert (row.bops, row.file_bytes, row.verified) == (3e6, 1000.5, 1)
    assert (row.seconds_per_step, row.cost) == pytest.approx((0.3, 3.0))
    found = tabulate(make_grid(), records)
    assert "| 3 M | 1 k | 1 of 2 | 0.3 | 3.00 |" in markdown(found)
    assert "| 3 M | 1 k | 1 of 2 |\n" in markdown(found, cost=False)
    assert "x float" not in markdown(found, cost=False)


def test_a_row_with_float_inputs_has_no_average_of_them(make_grid: MakeGrid, record: Record) -> None:
    entry = record("ours", "4/4", 0, 89)
    entry["results"]["average_bits"]["activations"] = None
    found = tabulate(make_grid(), [entry])
    assert found.blocks[0].rows[0].activation_bits is None
    assert "4.00/float" in markdown(found)


def test_two_metrics_are_refused(make_grid: MakeGrid, record: Record) -> None:
    records = [record("ours", "4/4", 0, 89), record("rival", "4/4", 0, 1.0, metric=PSNR)]
    with pytest.raises(ConfigError, match=r"one metric in all cells, found accuracy \[%\], loss-like \[dB\]"):
        tabulate(make_grid(), records)


def test_nothing_finished_is_refused(make_grid: MakeGrid, tmp_path: Path) -> None:
    grid = make_grid()
    with pytest.raises(ConfigError, match=r"expected finished cells in .* found none"):
        compare(grid, expand(grid), tmp_path)


def test_the_verdict_in_words(make_grid: MakeGrid, table: Table) -> None:
    found = table(make_grid(), {"ours": [90.0, 91.0], "rival": [80.0, 81.1]})
    line = verdict_line(found.blocks[0], found)
    assert (
        line == "ours minus the best other method, rival: +9.95 ± 0.64 points (95 % interval, 2 seeds paired): better"
    )
    single = table(make_grid(), {"ours": [90.0], "rival": [80.0]})
    assert str(verdict_line(single.blocks[0], single)).endswith("+10.00 points (one seed, no interval)")


def test_a_pure_number_has_no_unit(make_grid: MakeGrid, table: Table) -> None:
    correlation = {"name": "spearman", "unit": "", "higher_is_better": True}
    found = table(make_grid(), {"ours": [0.75], "rival": [0.5]}, metric=correlation)
    assert headings(found)[2] == "spearman"
    assert str(verdict_line(found.blocks[0], found)).endswith("rival: +0.2500 (one seed, no interval)")


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (999, "999"), (282_364, "282 k"), (1.2e7, "12 M"), (5.3e9, "5.3 G")]
)
def test_prefixes(value: float, text: str) -> None:
    assert prefixed(value) == text


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_printed_table_fits_the_terminal(width: int, make_grid: MakeGrid, table: Table) -> None:
    found = table(make_grid(), {"ours": [90.0, 91.0], "rival": [80.0, 81.1]})
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    for part in printed_parts(found):
        console.print(part, soft_wrap=isinstance(part, str))
    lines = [line for line in text.getvalue().splitlines() if line[:1] in set("┏┃┡│└")]
    assert len({len(line) for line in lines}) == 1  # one table, as what does not fit is left out
    assert len(lines[0]) <= width
    assert all("90.50 ± 6.35" in line for line in lines if "ours" in line and "│" in line)
    assert ("Not shown at this width" in text.getvalue()) == (width < 120)
