"""Pieces that all result pages share: where results and pictures lie, tables in Markdown, origin of numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: The one place of pictures that a document shows.
PICTURES = ROOT / "docs" / "results" / "pictures"
Record = dict[str, Any]


def lines_of(path: Path) -> list[Record]:
    """The records of a JSON-lines file in their order; none where there is no file.

    Args:
        path: the file.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = False) -> str:
    """A table in Markdown.

    Args:
        headings: of the columns.
        rows: their entries.
        numbers: align all columns but the first to the right.
    """
    rule = "| --- |" + " ---: |" * (len(headings) - 1) if numbers else "|---" * len(headings) + "|"
    lines = [f"| {' | '.join(headings)} |", rule]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation; the value alone where there is one, a dash where there is none."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def origin(records: Sequence[Record]) -> str:
    """Machine and versions on one line; several versions where records were made with several.

    Args:
        records: with ``machine`` and ``versions``.
    """
    found: dict[str, list[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            known = found.setdefault(name, [])
            if version and version not in known:
                known.append(version)
    versions = ", ".join(f"{name} {' and '.join(sorted(those))}" for name, those in found.items() if those)
    machine = records[0]["machine"]
    return f"{machine.get('processor') or 'CPU'}, {machine['cores']} cores; {versions}"


def picture(name: str, shows: str) -> str:
    """A line that shows a picture, in a page of any folder; ``write_results`` replaces ``ROOT`` by the way to it.

    Args:
        name: of the file without its ending.
        shows: text for those who do not see it.
    """
    return f"![{shows}](ROOT/docs/results/pictures/{name}.png)"
