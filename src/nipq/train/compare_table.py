"""The table of a comparison: means with intervals, differences paired by seed, as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from nipq.budget.budget import SI_PREFIXES
from nipq.errors import ConfigError, require
from nipq.tables import Column, FittedTable, Prose
from nipq.train.compare import FLOAT, Cell, CompareFolder, Grid
from nipq.train.records import Record
from nipq.train.run_folder import write_text

if TYPE_CHECKING:
    from pandas import DataFrame, Series

LEVEL = 0.95
#: Named states of a run in their order; the last one present is the result. Never the best.
FINAL = ("float", "frozen", "bn", "finetuned")
#: Mark of rows with fewer seeds than others.
FEWER = "*"
#: Ranks of the printed columns behind the first one, in the order of ``headings``: what a narrow terminal leaves out.
RANKS = (3, 0, 0, 0, 1, 4, 2, 5, 6, 7)
#: Factors and decimal prefixes, descending.
PREFIXES = tuple((float(factor), name) for name, factor in reversed(SI_PREFIXES.items()))


@dataclass(frozen=True)
class Metric:
    """Name, unit and direction of the score that is compared."""

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
    def of(cls, values: Sequence[float] | Series[float]) -> Estimate:
        """Mean and interval of independent values.

        Example:
            >>> found = Estimate.of([1.0, 2.0, 3.0])
            >>> found.mean, round(found.half, 3), found.count
            (2.0, 2.484, 3)
        """
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return cls(mean, None, 1)
        return cls(mean, float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * stats.sem(values)), count)

    def side(self) -> int:
        """1 or -1 when the whole interval is above or below 0, else 0; 0 also without an interval."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Row:
    """One method at one budget; numbers are means over its seeds."""

    label: str
    seeds: tuple[int, ...]
    #: Whether it has as many seeds as any row of the table.
    complete: bool
    #: Named states that the scores are from; one, unless its cells differ.
    state: str
    score: Estimate
    #: Score minus float, and baseline minus this row, paired by seed; the baseline has no latter one.
    to_float: Estimate | None
    behind: Estimate | None
    weight_bits: float | None
    activation_bits: float | None
    bops: float | None
    file_bytes: float
    #: Cells whose deployed model was proven.
    verified: int
    seconds_per_step: float | None
    #: Seconds of its steps over those of the float cell of the seed.
    cost: float | None


@dataclass(frozen=True)
class Verdict:
    """The baseline against the best other method at one budget: of those that share most seeds, the one least behind.

    The difference is paired by seed; the outcome is ``better`` or ``worse`` where its interval excludes 0, else
    ``open``.
    """

    baseline: str
    other: str
    difference: Estimate
    outcome: str


@dataclass(frozen=True)
class Block:
    """The rows of one budget, in the grid's order, and the verdict on the baseline."""

    budget: str
    rows: tuple[Row, ...]
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """The whole table: the float cells, a block for each budget, and the names of cells without a result."""

    name: str
    metric: Metric
    baseline: str
    float_row: Row | None
    blocks: tuple[Block, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare(grid: Grid, cells: Sequence[Cell], records: Mapping[str, Record] | str | Path) -> Comparison:
    """Put the finished cells of a grid side by side.

    Args:
        grid: the grid.
        cells: its cells.
        records: records by name of the cell, or the comparison's folder.

    Returns:
        The comparison.

    Raises:
        ConfigError: if no cell is finished, or cells were scored by different metrics.
        FileFormatError: if the folder's records cannot be read.
        MissingDependencyError: without pandas.
    """
    known = records if isinstance(records, Mapping) else CompareFolder(records).read()
    found = [known[cell.name] for cell in cells if cell.name in known]
    if not found:
        where = "the records" if isinstance(records, Mapping) else records
        raise ConfigError(f"expected finished cells in {where}, found none; run the grid without --table-only")
    return tabulate(grid, found, tuple(cell.name for cell in cells if cell.name not in known))


def tabulate(grid: Grid, records: Iterable[Record], missing: tuple[str, ...] = ()) -> Comparison:
    """Make a comparison of records of a grid's cells; ``missing`` are the names of cells without one."""
    records = list(records)
    metrics = {Metric(**record["results"].get("metric", {})) for record in records}
    if len(metrics) != 1:
        names = ", ".join(sorted(metric.title for metric in metrics))
        raise ConfigError(f"expected one metric in all cells, found {names}; compare tasks in grids of their own")
    (metric,) = metrics
    frames = _frames(records, metric)
    most = max(len(frame) for frame in frames.values())
    floats = frames.pop((None, FLOAT), None)
    blocks = []
    for budget in grid.budgets:
        base = frames.get((budget, grid.baseline))
        rows = tuple(
            _row(label, frames[budget, label], floats, None if label == grid.baseline else base, most)
            for label in grid.methods
            if (budget, label) in frames
        )
        if rows:
            blocks.append(Block(budget, rows, _verdict(grid, rows, metric)))
    float_row = None if floats is None else _row(FLOAT, floats, floats, None, most)
    return Comparison(grid.name, metric, grid.baseline, float_row, tuple(blocks), missing)


def _frames(records: Sequence[Record], metric: Metric) -> dict[tuple[str | None, str], DataFrame]:
    """Numbers of every cell: a frame for each budget and row, with a line for each seed."""
    pandas = require("pandas", extra="report", purpose="the table of a comparison")
    lines: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for record in records:
        cell, results = record["cell"], record["results"]
        is_float = cell["budget"] is None
        state = final_state(results["states"], is_float=is_float)
        line = {
            "seed": cell["seed"],
            "state": state,
            "score": float(results["states"][state]["test"][metric.name]),
            "weight_bits": None if is_float else results["average_bits"]["weights"],
            "activation_bits": None if is_float else results["average_bits"]["activations"],
            "bops": None if is_float else record["bops"],
            "file_bytes": results["bytes"]["float32" if is_float else "file"],
            "verified": bool(results["verified"]),
            "seconds": record.get("seconds_per_step", {}).get("overall"),
        }
        lines.setdefault((cell["budget"], cell["row"]), []).append(line)
    numbers = ["weight_bits", "activation_bits", "bops", "file_bytes", "seconds"]
    return {
        key: pandas.DataFrame(found).set_index("seed").sort_index().astype(dict.fromkeys(numbers, float))
        for key, found in lines.items()
    }


def final_state(states: Iterable[str], *, is_float: bool) -> str:
    """Name of the state that a run is judged by: its last one; of a float run the float state, not its 8-bit check."""
    present = set(states)
    return [name for name in ((FLOAT,) if is_float else FINAL) if name in present][-1]


def _row(label: str, mine: DataFrame, floats: DataFrame | None, base: DataFrame | None, most: int) -> Row:
    def paired(one: DataFrame | None, other: DataFrame | None) -> Estimate | None:
        # pandas aligns the two by seed; a seed that one of them lacks is left out.
        differences = [] if one is None or other is None else (one["score"] - other["score"]).dropna()
        return Estimate.of(differences) if len(differences) else None

    is_float = label == FLOAT
    ratios = None if floats is None else (mine["seconds"] / floats["seconds"]).dropna()
    return Row(
        label=label,
        seeds=tuple(int(seed) for seed in mine.index),
        complete=len(mine) == most,
        state=", ".join(state for state in FINAL if state in set(mine["state"])),
        score=Estimate.of(mine["score"]),
        to_float=None if is_float else paired(mine, floats),
        behind=paired(base, mine),
        weight_bits=_mean(mine["weight_bits"]),
        activation_bits=_mean(mine["activation_bits"]),
        bops=_mean(mine["bops"]),
        file_bytes=float(mine["file_bytes"].mean()),
        verified=int(mine["verified"].sum()),
        seconds_per_step=_mean(mine["seconds"].dropna()),
        cost=1.0 if is_float else None if ratios is None else _mean(ratios),
    )


def _mean(values: Series[float]) -> float | None:
    """The mean, or nothing where a value is missing, or all are."""
    return None if len(values) == 0 or values.isna().any() else float(values.mean())


def _verdict(grid: Grid, rows: Sequence[Row], metric: Metric) -> Verdict | None:
    others = [label for label in grid.methods if label != grid.baseline] if grid.against is None else grid.against
    found = [(row.label, row.behind) for row in rows if row.label in others and row.behind is not None]
    if not found:
        return None
    sign = 1 if metric.higher_is_better else -1
    most = max(behind.count for _, behind in found)
    other, difference = min(
        ((label, behind) for label, behind in found if behind.count == most), key=lambda pair: sign * pair[1].mean
    )
    return Verdict(grid.baseline, other, difference, {1: "better", 0: "open", -1: "worse"}[sign * difference.side()])


def headings(comparison: Comparison) -> list[str]:
    """Headings of the columns of :func:`cells_of`."""
    metric = comparison.metric
    return [
        "row", "seeds", metric.title, "minus float", f"{comparison.baseline} minus row",
        "bits W/A", "BOPs", "bytes", "verified", "s / step", "x float",
    ]  # fmt: skip


def cells_of(row: Row, comparison: Comparison) -> list[str]:
    """A row's entries as text."""
    digits = _digits(comparison)
    bits = "/".join("float" if value is None else f"{value:.2f}" for value in (row.weight_bits, row.activation_bits))
    return [
        row.label if row.complete else f"{row.label} {FEWER}",
        str(len(row.seeds)),
        interval(row.score, digits),
        interval(row.to_float, digits, sign=True),
        interval(row.behind, digits, sign=True),
        "float" if row.weight_bits is None else bits,
        "-" if row.bops is None else prefixed(row.bops),
        prefixed(row.file_bytes),
        f"{row.verified} of {len(row.seeds)}",
        "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
        "-" if row.cost is None else f"{row.cost:.2f}",
    ]


def interval(value: Estimate | None, digits: int, *, sign: bool = False) -> str:
    """Mean and half-width; the mean alone when there is one seed.

    Example:
        >>> interval(Estimate(1.234, 0.567, 3), 2, sign=True), interval(None, 2)
        ('+1.23 ± 0.57', '-')
    """
    if value is None:
        return "-"
    mean = f"{value.mean:{'+' if sign else ''}.{digits}f}"
    return mean if value.half is None else f"{mean} ± {value.half:.{digits}f}"


def prefixed(value: float) -> str:
    """A number in three digits or more with a decimal prefix.

    Example:
        >>> prefixed(12_644_352), prefixed(950)
        ('12.6 M', '950')
    """
    for factor, letter in PREFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {letter}" if value < 999.5 * factor else f"{value / factor:.0f} {letter}"
    return f"{value:.3g}"


def verdict_line(block: Block, comparison: Comparison) -> str | None:
    """The baseline against the best other method, in words; ``None`` without one."""
    verdict, metric = block.verdict, comparison.metric
    if verdict is None:
        return None
    difference = verdict.difference
    number = interval(difference, _digits(comparison), sign=True)
    unit = "points" if metric.unit == "%" else metric.unit
    text = f"{verdict.baseline} minus the best other method, {verdict.other}: {number} {unit}".rstrip()
    if difference.half is None:
        return f"{text} (one seed, no interval)"
    said = {"better": "better", "worse": "worse", "open": "not decided, the interval holds 0"}[verdict.outcome]
    return f"{text} (95 % interval, {difference.count} seeds paired): {said}"


def notes(comparison: Comparison) -> list[str]:
    """Sentences that belong under the table."""
    direction = "higher" if comparison.metric.higher_is_better else "lower"
    found = [
        f"Test split, last state of each run; mean and 95 % interval (Student's t) over seeds; {direction} is better. "
        "Differences are paired by seed."
    ]
    rows = [row for block in comparison.blocks for row in block.rows]
    if not all(row.complete for row in rows):
        found.append(f"{FEWER} fewer seeds than other rows.")
    states = sorted({row.state for row in rows})
    if len(states) > 1:
        parts = [f"{state}: {', '.join(dict.fromkeys(r.label for r in rows if r.state == state))}" for state in states]
        found.append(f"Last states: {'; '.join(parts)}.")
    if missing := comparison.missing:
        few = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        found.append(f"{len(missing)} cells have no result: {few}.")
    return found


def printed_parts(comparison: Comparison) -> list[FittedTable | Prose | str]:
    """One table for each budget that fits any console, its verdict, and the notes."""
    parts: list[FittedTable | Prose | str] = []
    for block in comparison.blocks:
        first, *others = headings(comparison)
        columns = (Column(heading.replace(" ", "\n"), rank=rank) for heading, rank in zip(others, RANKS, strict=True))
        table = FittedTable(Column(first, least=20), *columns, title=f"{comparison.name}, budget {block.budget}")
        best = block.verdict.other if block.verdict else None
        for row in (*_first(comparison), *block.rows):
            style = "bold" if row.label == comparison.baseline else "italic" if row.label == best else ""
            table.add_row(*cells_of(row, comparison), style=style)
        parts.append(table)
        if line := verdict_line(block, comparison):
            parts.append(line)
    return [*parts, *map(Prose, notes(comparison))]


def markdown(comparison: Comparison, *, cost: bool = True) -> str:
    """The comparison as Markdown; without ``cost`` where the machine was too busy for seconds to mean anything."""
    columns = slice(None if cost else -2)
    names = headings(comparison)[columns]
    lines = [f"# {comparison.name}", ""]
    for block in comparison.blocks:
        lines += [f"## Budget {block.budget}", "", _line(names), "|---" * len(names) + "|"]
        lines += [_line(cells_of(row, comparison)[columns]) for row in (*_first(comparison), *block.rows)] + [""]
        if line := verdict_line(block, comparison):
            lines += [f"{line}.", ""]
    return "\n".join([*lines, "\n\n".join(note.replace(FEWER, "\\" + FEWER) for note in notes(comparison)), ""])


def save_table(comparison: Comparison, folder: CompareFolder) -> None:
    """Write the table as Markdown and as JSON."""
    write_text(folder.table_markdown, markdown(comparison))
    write_text(folder.table_json, json.dumps(comparison.to_dict(), indent=1) + "\n")


def _first(comparison: Comparison) -> list[Row]:
    return [comparison.float_row] if comparison.float_row else []


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |"


def _digits(comparison: Comparison) -> int:
    """Decimals of a score: as many as tell neighbouring models apart."""
    scale = comparison.float_row or comparison.blocks[0].rows[0]
    return 2 if comparison.metric.unit == "%" or abs(scale.score.mean) >= 10 else 4
