"""Text tables that fit the width of the terminal: columns are left out or continued below, borders stay whole.

A cell of text that is too wide is broken between words, and a word such as a layer's name behind its dots.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

#: Columns of plain text, as a terminal has at least.
WIDTH = 80

#: Width to which a column of text is narrowed where no other way is left.
NARROW = 8

#: Spaces between the columns of a table without borders.
GAP = 2

#: Places where a line may be broken, the better ones first: in a layer's full name or a path behind its dots.
BREAKS = (re.compile(r"(?<= )"), re.compile(r"(?<=[./])"), re.compile(r"(?<=[_:,=-])"))


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
        columns: its columns; the first one names the rows. Without any heading no line of headings is drawn.
        title: a line above it.
        borders: draw lines around the cells. Without them a name that is wider than its column has a line of its own.
    """

    def __init__(self, *columns: Column, title: str = "", borders: bool = True) -> None:
        self.columns, self.title, self.borders = columns, title, borders
        self.rows: list[tuple[str, ...]] = []
        self.styles: list[str] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add a row, one cell for each column.

        Args:
            cells: texts; they may have several lines.
            style: of the whole row, such as ``"bold"``.
        """
        assert len(cells) == len(self.columns)
        self.rows.append(cells)
        self.styles.append(style)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._sections.add(len(self.rows) - 1)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Tables no wider than the console."""
        shown = list(range(len(self.columns)))
        while self._width(shown) > options.max_width and (droppable := [i for i in shown if self.columns[i].rank]):
            shown.remove(max(droppable, key=lambda i: self.columns[i].rank))
        if self.title:
            yield Prose(self.title)
        rest = shown[1:]
        while rest:
            block = [shown[0], rest.pop(0)]
            while rest and self._width([*block, rest[0]]) <= options.max_width:
                block.append(rest.pop(0))
            yield (self._table if self.borders else self._plain)(block, options.max_width)
        if gone := [" ".join(self.columns[i].heading.split()) for i in range(len(self.columns)) if i not in shown]:
            yield Prose(f"Not shown at this width: {', '.join(gone)}; to_dict() and --json have everything.")

    def _width(self, shown: Sequence[int]) -> int:
        """Width with the wrapped columns as narrow as they may be, and borders."""
        return self._drawn([self._narrowest(i) for i in shown])

    def _narrowest(self, index: int) -> int:
        longest, least = self._longest(index), self.columns[index].least
        return longest if least is None else min(longest, least)

    def _longest(self, index: int) -> int:
        cells = [self.columns[index].heading, *(row[index] for row in self.rows)]
        return max(cell_len(line) for cell in cells for line in cell.split("\n"))

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int]:
        """Widths of the columns: their longest cells, or less for the widest ones of text until all fit."""
        widths = {index: self._longest(index) for index in shown}
        fits = self._width(shown) <= width
        floors = {
            index: self._narrowest(index) if fits else min(widths[index], NARROW)
            for index in shown
            if self.columns[index].least is not None
        }
        while self._drawn(list(widths.values())) > width and (left := [i for i in floors if widths[i] > floors[i]]):
            widths[max(left, key=widths.__getitem__)] -= 1
        return widths

    def _table(self, shown: Sequence[int], width: int) -> Table:
        table = Table(show_header=any(self.columns[index].heading for index in shown))
        widths = self._widths(shown, width)
        for index in shown:
            column = self.columns[index]
            heading = "\n".join(wrapped(column.heading, widths[index]))
            is_number = column.least is None
            table.add_column(Text(heading), justify="right" if is_number else "left", no_wrap=True, width=widths[index])
        for number, (row, style) in enumerate(zip(self.rows, self.styles, strict=True)):
            cells = (Text("\n".join(wrapped(row[index], widths[index]))) for index in shown)
            table.add_row(*cells, style=style, end_section=number in self._sections)
        return table

    def _plain(self, shown: Sequence[int], width: int) -> Text:
        """The table without borders."""
        widths = self._widths(shown, width)
        lines: list[str] = []
        for row in ([column.heading for column in self.columns], *self.rows):
            cells = [wrapped(row[index], widths[index]) for index in shown]
            if len(cells[0]) > 1:
                lines += wrapped(row[shown[0]], width)
                cells[0] = [""]
            for number in range(max(map(len, cells))):
                line = ""
                for index, cell in zip(shown, cells, strict=True):
                    text = cell[number] if number < len(cell) else ""
                    blank = " " * (widths[index] - cell_len(text))
                    line += (blank + text if self.columns[index].least is None else text + blank) + " " * GAP
                lines.append(line.rstrip())
        return Text("\n".join(lines), no_wrap=True)

    def _drawn(self, widths: Sequence[int]) -> int:
        """Width of the table, with borders or gaps."""
        return 1 + sum(3 + width for width in widths) if self.borders else sum(widths) + GAP * (len(widths) - 1)


class Prose:
    """Text that is broken as :func:`wrapped` does, for a console of any width.

    Args:
        text: taken as it is, without markup.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Lines no wider than the console."""
        yield Text("\n".join(wrapped(self.text, options.max_width)), no_wrap=True)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text: broken between words, a longer word behind a dot or the like, and only then inside a part.

    Args:
        text: one or more lines.
        width: of a line, columns of the terminal.

    Example:
        >>> wrapped("float: encoder.layer.11.attention.self.query stays", 24)
        ['float:', 'encoder.layer.11.', 'attention.self.query', 'stays']
    """
    return [part.rstrip(" ") for line in text.split("\n") for part in _filled(line, width, BREAKS)]


def _filled(text: str, width: int, breaks: Sequence[re.Pattern[str]]) -> list[str]:
    """Lines filled with pieces, each whole where it fits in a line."""
    if cell_len(text.rstrip(" ")) <= width:
        return [text]
    if not breaks:
        return chop_cells(text, width)
    lines = [""]
    for piece in filter(None, breaks[0].split(text)):
        if cell_len((lines[-1] + piece).rstrip(" ")) <= width:
            lines[-1] += piece
        else:
            lines += _filled(piece, width, breaks[1:])
    return lines if lines[0] else lines[1:]


def fitting(parts: Sequence[str], width: int) -> str:
    """Parts of a line in their order, without those that would make it too long.

    Args:
        parts: short texts, the important ones first.
        width: of the line, columns of the terminal.

    Example:
        >>> fitting(["float 1/3", "loss 0.5", "a very long one", "lr 0.1"], 30)
        'float 1/3  loss 0.5  lr 0.1'
    """
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        line = longer if cell_len(longer) <= width else line
    return line


def plain_text(*parts: RenderableType) -> str:
    """Rich renderables as plain text, 80 columns at most, each on lines of its own."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(*parts, sep="\n", crop=False)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
