"""The tables of README.md, out of records."""

from __future__ import annotations

import statistics
from typing import Any

from settings import Setting

Record = dict[str, Any]


def tables(records: list[Record], groups: dict[str, dict[str, Setting]], reported: tuple[str, ...]) -> str:
    """One table for each group, a line for each of its settings.

    Args:
        records: lines of results.jsonl.
        groups: settings by group and name; one that is in several groups was run once.
        reported: groups whose tables show test images.

    Returns:
        Markdown.
    """
    shown = []
    for group, settings in groups.items():
        parts = ["validation", "test"] if group in reported else ["validation"]
        shown.append(f"### {group[0].upper()}{group[1:]}\n\n{_table(records, settings, parts)}")
    return "\n\n".join(shown)


def _table(records: list[Record], settings: dict[str, Setting], parts: list[str]) -> str:
    heads = ["setting", "seeds"]
    for part in parts:
        heads += [f"float, {part}", f"frozen, {part}", f"end, {part}", f"end minus float, {part}"]
    lines = ["| " + " | ".join([*heads, "bits W/A, at most"]) + " |", "|" + " --- |" * (len(heads) + 1)]
    for name, setting in settings.items():
        own = [record for record in records if Setting(**record["setting"]) == setting]
        if own:
            lines.append("| " + " | ".join(_row(name, own, parts)) + " |")
    return "\n".join(lines)


def _row(name: str, own: list[Record], parts: list[str]) -> list[str]:
    cells = [name, str(len({record["seed"] for record in own}))]
    for part in parts:
        scored = [record for record in own if part in record["scores"]["float"]]
        once = list({record["seed"]: record for record in scored}.values())
        floats, ends = _scores(once, "float", part), _scores(once, "final", part)
        cells += [_mean(floats), _mean(_scores(once, "frozen", part)), _mean(ends)]
        cells.append(_mean([end - start for end, start in zip(ends, floats, strict=True)], sign="+"))
    return [*cells, _bits(own)]


def _scores(records: list[Record], stage: str, part: str) -> list[float]:
    return [record["scores"][stage][part] for record in records if stage in record["scores"]]


def _mean(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def _bits(records: list[Record]) -> str:
    costs = [record["costs"] for record in records if record["costs"]]
    if not costs:
        return "float"
    return "/".join(f"{max(cost[f'average {kind} bits'] for cost in costs):.3f}" for kind in ("weight", "activation"))
