"""Text tables that fit the width of the terminal: columns are left out or continued below, borders never break."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

#: Columns of plain text, as a terminal has at least.
WIDTH = 80


@dataclass(frozen=True)
class Column:
    """A column of a :class:`FittedTable`.

    Attributes:
        heading: its heading.
        rank: 0 for a column that is always shown; where the width is too small, others are left out, largest rank
            first.
        least: columns of the terminal to which it may be wrapped; None for numbers, which are never wrapped.
    """

    heading: str
    rank: int = 0
    least: int | None = None


class FittedTable:
    """A table that fits any console.

    Columns with a rank are left out where the width is too small, with a note that says which. Those without one that
    do not fit continue in another table below, with the first column repeated.

    Args:
        columns: its columns; the first one names the rows.
        title: a line above it.
    """

    def __init__(self, *columns: Column, title: str = "") -> None:
        self.columns, self.title = columns, title
        self.rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row, one cell for each column."""
        assert len(cells) == len(self.columns)
        self.rows.append(cells)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Tables no wider than the console."""
        shown = list(range(len(self.columns)))
        while self._width(shown) > options.max_width and (droppable := [i for i in shown if self.columns[i].rank]):
            shown.remove(max(droppable, key=lambda i: self.columns[i].rank))
        if self.title:
            yield Text(self.title)
        rest = shown[1:]
        while rest:
            block = [shown[0], rest.pop(0)]
            while rest and self._width([*block, rest[0]]) <= options.max_width:
                block.append(rest.pop(0))
            yield self._table(block, options.max_width)
        if gone := [column.heading for i, column in enumerate(self.columns) if i not in shown]:
            yield Text(f"Not shown at this width: {', '.join(gone)}; to_dict() has everything.")

    def _width(self, shown: Sequence[int]) -> int:
        """Width with the wrapped columns as narrow as they may be, and borders."""
        return 1 + sum(3 + min(self._longest(i), self.columns[i].least or WIDTH) for i in shown)

    def _longest(self, index: int) -> int:
        cells = [self.columns[index].heading, *(row[index] for row in self.rows)]
        return max(cell_len(line) for cell in cells for line in cell.split("\n"))

    def _table(self, shown: Sequence[int], width: int) -> Table:
        table, fits = Table(), self._width(shown) <= width
        for index in shown:
            column = self.columns[index]
            is_text = column.least is not None
            table.add_column(
                Text(column.heading),
                justify="left" if is_text else "right",
                overflow="fold",
                no_wrap=not is_text,
                min_width=min(self._longest(index), column.least or WIDTH) if fits or not is_text else None,
            )
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in shown))
        return table


def plain_text(part: RenderableType) -> str:
    """A rich renderable as plain text, 80 columns at most."""
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, highlight=False).print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
