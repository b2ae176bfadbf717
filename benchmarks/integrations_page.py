"""The results part of docs/integrations.md, from the committed file; ``experiments/write_results.py`` calls it."""

from __future__ import annotations

from benchmarks import record
from benchmarks.speed_page import Record, number, origin, span, table

#: Largest share by which an integration may lengthen a step.
GOAL = 0.02


def page() -> str:
    """A table for each network, and how they were made."""
    content = record.read("integrations")
    return "" if content is None else overhead(content)


def overhead(content: Record) -> str:
    """What each integration adds to a step."""
    parts = []
    for network in content["networks"].values():
        rows = [
            [
                trainer,
                span([100 * (value - 1) for value in row["ratio"]]),
                span(row["extra_microseconds"], 0),
                span(row["trainer"]),
                "yes" if round(row["ratio"][1] - 1, 4) < GOAL else "**no**",
            ]
            for trainer, row in network["rows"].items()
        ]
        headings = [
            "",
            "integration adds, %",
            "microseconds",
            "trainer / plain loop, both by hand",
            f"under {GOAL:.0%}",
        ]
        parts.append(
            f"**{network['shown']}**, a step of {number(network['milliseconds'])} ms in the plain loop by hand\n\n"
            + table(headings, rows)
        )
    return (
        "\n".join(parts)
        + "\nMedian (quartiles) over rounds of the ratio and of the difference between a trainer with its integration "
        "and the same trainer with `Search` by hand (`penalty()` in the loss, `step()` after the step). CPU time, one "
        "thread. " + origin(content)
    )
