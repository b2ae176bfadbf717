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
    """What each integration adds to a step: seen where little else takes time, set against a step that does more."""
    least, small = content["networks"]["least"], content["networks"]["small"]
    step = small["milliseconds"][1] * 1e3
    rows = []
    for trainer, row in small["rows"].items():
        extra = least["rows"][trainer]["extra_microseconds"]
        share = extra[1] / step
        measured = [100 * (value - 1) for value in row["ratio"]]
        low, high = extra[0] / step, extra[2] / step
        reached = (
            "yes" if high < GOAL else "**no**" if low >= GOAL else "not settled"
        )  # by three quarters of the rounds
        rows.append([trainer, span(extra, 0), f"{100 * share:.1f} %", reached, span(measured, 1), span(row["trainer"])])
    headings = [
        "", "integration adds, microseconds", f"of a step of {number(small['milliseconds'])} ms", f"under {GOAL:.0%}",
        "seen there, %", "trainer / plain loop, by hand",
    ]  # fmt: skip
    return (
        table(headings, rows)
        + "\nMedian (quartiles) over rounds of the difference between a trainer with its integration and the same one "
        f"with `Search` by hand (`penalty()` in the loss, `step()` after the step), on {least['shown']}, where a step "
        f"takes {number(least['milliseconds'])} ms in the plain loop; set against a step of {small['shown']}; and the "
        "difference as it shows there. CPU time of one thread, the shortest step of each run. " + origin(content)
    )
