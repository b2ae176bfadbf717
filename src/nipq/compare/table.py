"""The table of a comparison: means with intervals, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from nipq.compare.cells import Cell
from nipq.compare.grid import FLOAT, Grid, Tree
from nipq.compare.record import CompareFolder
from nipq.errors import ConfigError

LEVEL = 0.95
FINAL = ("float", "frozen", "bn", "finetuned")
"""Named states of a run in their order; the last one present is the result. Never the best."""


@dataclass(frozen=True)
class Metric:
    """What is compared: its name and unit, and which direction is good."""

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """Name and unit, for headings and axes; a pure number has no unit."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t), ``None`` for a single seed."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and interval of independent values.

        Example:
            >>> found = Estimate.of([1.0, 2.0, 3.0])
            >>> found.mean, round(found.half, 3), found.count
            (2.0, 2.484, 3)
        """
        count = len(values)
        half = None
        if count > 1:
            half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.fmean(values), half, count)

    def side(self) -> int:
        """1 or -1 when the whole interval is above or below 0, else 0; 0 also without an interval."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        label: Its name in the grid.
        seeds: Seeds with a result.
        complete: Whether it has as many seeds as any row of the table.
        state: Named states that the scores are from (one, unless its cells differ).
        score: Test metric of the final state.
        to_float: Score minus float, paired by seed.
        behind: Baseline minus this row, paired by seed; ``None`` for the baseline itself.
        weight_bits: Mean of the average weight bits.
        activation_bits: Mean of the average activation bits; ``None`` where inputs stay float.
        bops: Mean bit-operations per sample.
        file_bytes: Mean bytes on disk.
        verified: Cells whose deployed model was proven.
        seconds_per_step: Mean seconds of a training step.
        cost: Its steps' seconds over those of the float cell of the seed.
    """

    label: str
    seeds: tuple[int, ...]
    complete: bool
    state: str
    score: Estimate
    to_float: Estimate | None
    behind: Estimate | None
    weight_bits: float | None
    activation_bits: float | None
    bops: float | None
    file_bytes: float
    verified: int
    seconds_per_step: float | None
    cost: float | None


@dataclass(frozen=True)
class Verdict:
    """The baseline against its best rival at one budget.

    Attributes:
        baseline: The baseline's row.
        rival: The row with the smallest paired distance behind the baseline, among those that share most seeds.
        difference: Baseline minus rival, paired by seed, in units of the metric.
        outcome: ``better`` or ``worse`` where the interval excludes 0, else ``open``.
    """

    baseline: str
    rival: str
    difference: Estimate
    outcome: str


@dataclass(frozen=True)
class Block:
    """The rows of one budget, in the grid's order, and what they say about the baseline."""

    budget: str
    rows: tuple[Row, ...]
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """The whole table.

    Attributes:
        name: Of the grid.
        metric: What is compared.
        baseline: Row that is set against its rivals.
        float_row: The float cells.
        blocks: One for each budget.
        missing: Cells without a result.
    """

    name: str
    metric: Metric
    baseline: str
    float_row: Row | None
    blocks: tuple[Block, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare(grid: Grid, cells: Sequence[Cell], folder: str | Path) -> Comparison:
    """Read the finished cells of a folder and put them side by side.

    Args:
        grid: The grid.
        cells: Its cells.
        folder: The comparison's folder.

    Returns:
        The comparison.

    Raises:
        ConfigError: If no cell is finished, or cells were scored by different metrics.
        FileFormatError: If a record cannot be read.
    """
    place = CompareFolder(folder)
    read = [(cell, place.read(cell.name)) for cell in cells]
    records = {(cell.row, cell.budget, cell.seed): record for cell, record in read if record is not None}
    if not records:
        raise ConfigError(f"expected finished cells in {place.path}, found none; run the grid without --table-only")
    return tabulate(grid, records, tuple(cell.name for cell, record in read if record is None))


def tabulate(
    grid: Grid, records: Mapping[tuple[str, str | None, int], Tree], missing: tuple[str, ...] = ()
) -> Comparison:
    """Make a comparison of records that are already read.

    Args:
        grid: The grid.
        records: By row, budget and seed.
        missing: Names of cells without a record.

    Returns:
        The comparison.

    Raises:
        ConfigError: If cells were scored by different metrics.
    """
    metrics = {Metric(**record["results"].get("metric", {})) for record in records.values()}
    if len(metrics) != 1:
        names = ", ".join(sorted(metric.title for metric in metrics))
        raise ConfigError(f"expected one metric in all cells, found {names}; compare tasks in grids of their own")
    (metric,) = metrics
    most = max(len({seed for _, _, seed in _of(records, row, budget)}) for row, budget, _ in records)
    floats = {seed: records[FLOAT, None, seed] for _, _, seed in _of(records, FLOAT, None)}

    def rows(budget: str) -> Iterator[Row]:
        base = {seed: records[grid.baseline, budget, seed] for *_, seed in _of(records, grid.baseline, budget)}
        for label in grid.methods:
            mine = {seed: records[label, budget, seed] for *_, seed in _of(records, label, budget)}
            if mine:
                yield _row(label, mine, floats, {} if label == grid.baseline else base, metric, most)

    blocks = tuple(
        Block(budget, found, _verdict(grid, found, metric)) for budget in grid.budgets if (found := tuple(rows(budget)))
    )
    float_row = _row(FLOAT, floats, {}, {}, metric, most) if floats else None
    return Comparison(grid.name, metric, grid.baseline, float_row, blocks, missing)


def final_score(record: Tree, metric: Metric) -> tuple[str, float]:
    """The last named state of a cell and its test metric; a float cell's is its float state."""
    states = record["results"]["states"]
    state = final_state(states, is_float=record["cell"]["budget"] is None)
    return state, float(states[state]["test"][metric.name])


def final_state(states: Iterable[str], *, is_float: bool) -> str:
    """Name of the state that a run is judged by: its last one; of a float run the float state, not its 8-bit check.

    Args:
        states: names of the states that the run has.
        is_float: whether it trained the float network only.
    """
    present = set(states)
    return [name for name in ((FLOAT,) if is_float else FINAL) if name in present][-1]


def _of(
    records: Mapping[tuple[str, str | None, int], Tree], row: str, budget: str | None
) -> list[tuple[str, str | None, int]]:
    return [key for key in records if key[:2] == (row, budget)]


def _row(
    label: str, mine: dict[int, Tree], floats: dict[int, Tree], base: dict[int, Tree], metric: Metric, most: int
) -> Row:
    scores = {seed: final_score(record, metric) for seed, record in mine.items()}
    results = [record["results"] for record in mine.values()]
    is_float = label == FLOAT
    seconds = {seed: value for seed, record in mine.items() if (value := _seconds(record)) is not None}
    starts = {seed: value for seed, record in floats.items() if (value := _seconds(record)) is not None}
    ratios = [value / starts[seed] for seed, value in seconds.items() if seed in starts]

    def paired(others: dict[int, Tree], sign: int) -> Estimate | None:
        found = [
            sign * (scores[seed][1] - final_score(other, metric)[1]) for seed, other in others.items() if seed in scores
        ]
        return Estimate.of(found) if found else None

    return Row(
        label=label,
        seeds=tuple(sorted(mine)),
        complete=len(mine) == most,
        state=", ".join(sorted({state for state, _ in scores.values()}, key=FINAL.index)),
        score=Estimate.of([score for _, score in scores.values()]),
        to_float=paired(floats, 1),
        behind=paired(base, -1),
        weight_bits=None if is_float else _mean([result["average_bits"]["weights"] for result in results]),
        activation_bits=None if is_float else _mean([result["average_bits"]["activations"] for result in results]),
        bops=None if is_float else _mean([record["bops"] for record in mine.values()]),
        file_bytes=statistics.fmean(result["bytes"]["float32" if is_float else "file"] for result in results),
        verified=sum(bool(result["verified"]) for result in results),
        seconds_per_step=_mean(list(seconds.values())),
        cost=1.0 if is_float else _mean(ratios),
    )


def _verdict(grid: Grid, rows: Sequence[Row], metric: Metric) -> Verdict | None:
    rivals = [label for label in grid.methods if label != grid.baseline] if grid.rivals is None else grid.rivals
    found = [(row.label, row.behind) for row in rows if row.label in rivals and row.behind is not None]
    if not found:
        return None
    sign = 1 if metric.higher_is_better else -1
    most = max(behind.count for _, behind in found)
    rival, difference = min(
        ((label, behind) for label, behind in found if behind.count == most), key=lambda pair: sign * pair[1].mean
    )
    return Verdict(grid.baseline, rival, difference, {1: "better", 0: "open", -1: "worse"}[sign * difference.side()])


def _seconds(record: Tree) -> float | None:
    value = record.get("seconds_per_step", {}).get("overall")
    return None if value is None else float(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
