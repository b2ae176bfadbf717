"""Overhead of the integrations, from the committed file; for ``experiments/write_results.py``."""

from __future__ import annotations

from benchmarks import record
from benchmarks.speed_page import Record, number, origin, span
from experiments.shown import table

#: Largest share by which an integration may lengthen a step.
GOAL = 0.02


def page() -> str:
    """A table for each network, and how they were made."""
    content = record.read("integrations")
    return "" if content is None else overhead(content)


def overhead(content: Record) -> str:
    """Table of what each integration adds to a step, measured on a short step and set against a longer one."""
    step = content["small_step"]
    rows = []
    for trainer, row in content["rows"].items():
        share = [value / (step[1] * 1e3) for value in row["extra_microseconds"]]
        reached = "yes" if share[2] < GOAL else "**no**" if share[0] >= GOAL else "not settled"
        shown = span([100 * value for value in share], 1)
        rows.append([trainer, span(row["extra_microseconds"], 0), shown, reached, span(row["milliseconds"])])
    headings = [
        "", "integration adds, microseconds", f"% of a step of {number(step)} ms", f"under {GOAL:.0%}",
        "least step by hand, ms",
    ]  # fmt: skip
    return (
        table(headings, rows)
        + "\nWhat a trainer with its integration takes more than the same one with `Search` by hand (`penalty()` in "
        "the loss, `step()` after the step), on two linear layers of a few numbers; set against a step of two "
        "convolutions, 64 x 3 x 8 x 8, in the plain loop. Median over rounds and its 95 % interval (quartiles in the "
        f"last column); in a round both train side by side on one core, {content['steps']} steps each, in turns of a "
        "few. CPU time of one thread. " + origin(content)
    )


#: Blocks of the pages by name.
BLOCKS = {"speed-integrations": page}
