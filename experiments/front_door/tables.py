"""The tables of README.md, out of records."""

from __future__ import annotations

import statistics
from typing import Any

Record = dict[str, Any]


def tables(records: list[Record]) -> str:
    """One table for each group, a line for each of its settings.

    Args:
        records: lines of results.jsonl.

    Returns:
        Markdown.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return "\n\n".join(f"### {group[0].upper()}{group[1:]}\n\n{_table(found)}" for group, found in groups.items())


def _table(records: list[Record]) -> str:
    parts = list(records[0]["scores"]["float"])
    names = list(dict.fromkeys(record["name"] for record in records))
    heads = ["setting", "seeds"]
    for part in parts:
        heads += [f"float, {part}", f"frozen, {part}", f"end, {part}", f"end minus float, {part}"]
    heads += ["average bits W/A, at most", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in names:
        own = [record for record in records if record["name"] == name]
        cells = [name, str(len(own))]
        for part in parts:
            floats, ends = _scores(own, "float", part), _scores(own, "final", part)
            cells += [_mean(floats), _mean(_scores(own, "frozen", part)), _mean(ends)]
            cells.append(_mean([end - start for end, start in zip(ends, floats, strict=True)], sign="+"))
        cells += [_bits(own), _mean([record["seconds"] for record in own], digits=0)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _scores(records: list[Record], stage: str, part: str) -> list[float]:
    return [record["scores"][stage][part] for record in records if stage in record["scores"]]


def _mean(values: list[float], sign: str = "", digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def _bits(records: list[Record]) -> str:
    costs = [record["costs"] for record in records if record["costs"]]
    if not costs:
        return "float"
    return "/".join(f"{max(cost[f'average {kind} bits'] for cost in costs):.3f}" for kind in ("weight", "activation"))
