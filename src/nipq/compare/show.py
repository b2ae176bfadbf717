"""A comparison as text: for the terminal and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from nipq.compare.record import CompareFolder
from nipq.compare.table import Block, Comparison, Estimate, Row
from nipq.train.run_folder import write_text

FEWER = "*"
WIDTH = 130
"""Columns that the table needs, for an output that does not say or is narrower: long lines are better than folded
numbers."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


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
    """The baseline against its best rival, in words; ``None`` without one."""
    verdict, metric = block.verdict, comparison.metric
    if verdict is None:
        return None
    difference = verdict.difference
    number = interval(difference, _digits(comparison), sign=True)
    unit = "points" if metric.unit == "%" else metric.unit
    text = f"{verdict.baseline} minus the best rival, {verdict.rival}: {number} {unit}".rstrip()
    if difference.half is None:
        return f"{text} (one seed, no interval)"
    said = {"better": "better", "worse": "worse", "open": "not decided, the interval holds 0"}[verdict.outcome]
    return f"{text} (95 % interval, {difference.count} seeds paired): {said}"


def notes(comparison: Comparison) -> list[str]:
    """What has to be said under the table."""
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
    if comparison.missing:
        found.append(f"{len(comparison.missing)} cells have no result: {_few(comparison.missing)}.")
    return found


def rich_table(comparison: Comparison) -> Group:
    """The comparison for a rich console: one table for each budget."""
    parts: list[Table | str] = []
    for block in comparison.blocks:
        table = Table(title=f"{comparison.name}, budget {block.budget}", title_justify="left", box=SIMPLE_HEAD)
        for number, heading in enumerate(headings(comparison)):
            table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
        best = block.verdict.rival if block.verdict else None
        for row in ([comparison.float_row] if comparison.float_row else []) + list(block.rows):
            style = "bold" if row.label == comparison.baseline else "italic" if row.label == best else None
            table.add_row(*cells_of(row, comparison), style=style)
        parts.append(table)
        if line := verdict_line(block, comparison):
            parts.append(line)
    return Group(*parts, *notes(comparison))


def markdown(comparison: Comparison, *, cost: bool = True) -> str:
    """The comparison as Markdown.

    Args:
        comparison: The table.
        cost: With seconds for a step; without, where the machine was too busy for them to mean anything.
    """
    columns = slice(None if cost else -2)
    names = headings(comparison)[columns]
    lines = [f"# {comparison.name}", ""]
    for block in comparison.blocks:
        lines += [f"## Budget {block.budget}", "", _line(names), "|---" * len(names) + "|"]
        rows = ([comparison.float_row] if comparison.float_row else []) + list(block.rows)
        lines += [_line(cells_of(row, comparison)[columns]) for row in rows] + [""]
        if line := verdict_line(block, comparison):
            lines += [f"{line}.", ""]
    return "\n".join([*lines, "\n\n".join(note.replace(FEWER, "\\" + FEWER) for note in notes(comparison)), ""])


def save_table(comparison: Comparison, folder: CompareFolder) -> None:
    """Write the table as Markdown and as JSON.

    Args:
        comparison: The table.
        folder: Where to.
    """
    write_text(folder.table_markdown, markdown(comparison))
    write_text(folder.table_json, json.dumps(comparison.to_dict(), indent=1) + "\n")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table.

    Args:
        comparison: The table.
        console: Where to.
    """
    console.width = max(console.width, WIDTH)
    console.print(rich_table(comparison), highlight=False, markup=False)


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |"


def _digits(comparison: Comparison) -> int:
    """Decimals of a score: as many as tell neighbouring models apart."""
    scale = comparison.float_row or comparison.blocks[0].rows[0]
    return 2 if comparison.metric.unit == "%" or abs(scale.score.mean) >= 10 else 4


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
