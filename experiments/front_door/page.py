"""Table of the README's own loop, from the records; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

from experiments.shown import Record, lines_of, origin, spread, table

HERE = Path(__file__).parent
#: Rows by budget: group and name of a setting, and how the page calls it.
ROWS = (
    ("4/4", "final", "4/4, session", "`QATSession`, the README's loop"),
    ("4/4", "today", "calibration, bits by noise", "no training, mixed bits"),
    ("4/4", "today", "calibration, one width", "no training, one bit-width"),
    ("4/4", "today", "search alone, 5 epochs", "the README's loop of before: search alone"),
    ("3/3", "final", "3/3, session", "`QATSession`, the README's loop"),
    ("3/3", "final", "3/3, calibration, bits by noise", "no training, mixed bits"),
    ("3/3", "final", "3/3, calibration, one width", "no training, one bit-width"),
)


def section() -> str:
    """Test accuracy of the loop and of calibration without training, at two budgets."""
    records, rows, shown = lines_of(HERE / "results.jsonl"), [], []
    for budget, group, name, label in ROWS:
        own = [record for record in records if (record["group"], record["name"]) == (group, name)]
        if not own:
            continue
        shown += own
        floats, ends = _test(own, "float"), _test(own, "final")
        behind = [end - start for end, start in zip(ends, floats, strict=True)]
        rows.append([budget, label, len(own), spread(floats), spread(ends), spread(behind)])
    headings = ["budget W/A", "method", "seeds", "float [%]", "quantized [%]", "quantized minus float, points"]
    return (
        table(headings, rows)
        + "\nTest accuracy, mean and standard deviation over seeds. "
        + f"`python experiments/front_door/run.py final today`; {origin(shown)}.\n"
    )


def _test(records: list[Record], stage: str) -> list[float]:
    return [record["scores"][stage]["test"] for record in records]


#: Blocks of this module by name.
BLOCKS = {"front-door": section}
