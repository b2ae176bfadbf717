"""Table of what was tried against the library, from its counts; for ``experiments/write_results.py``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from experiments.hardening.trials import FAULT, REFUSED, RESULTS, RIGHT, SIGNED
from experiments.shown import lines_of, origin, table

#: Names of the kinds of trials on the page, in its order.
NAMES = {
    "network": "random networks, prepared to deployed",
    "packed": "packed files, damaged or edited",
    "onnx": "ONNX files",
    "npz": "NPZ files",
    "program": "`.pt2` programs",
    "checkpoint": "checkpoints",
    "config": "bad configs",
    "kill": "killed runs, continued",
}

#: Outcomes in the order of the columns.
OUTCOMES = (RIGHT, REFUSED, SIGNED, FAULT)


def section() -> str:
    """The sum in one sentence, the counts of each kind, and how they were made."""
    lines = lines_of(RESULTS)
    kinds = [kind for kind in NAMES if any(line["kind"] == kind for line in lines)]
    counts = {kind: _counts(kind, lines) for kind in kinds}
    total = sum((sum(found.values()) for found in counts.values()), 0)
    faults = [fault["what"] for line in lines for fault in line["faults"]]
    hangs = sum(what.startswith("hangs") for what in faults)
    silent = sum(what.startswith("accepted") for what in faults)
    rows = [
        [NAMES[kind], *(f"{count:,}" for count in (sum(found.values()), *(found[outcome] for outcome in OUTCOMES)))]
        for kind, found in counts.items()
    ]
    seconds = sum(line["seconds"] for line in lines)
    commands = sorted({line["command"].split(" ")[2] for line in lines})
    return (
        f"**{total:,} trials: {len(faults) - hangs - silent} tracebacks, {hangs} hangs, {silent} silent changes.**\n\n"
        + table(["tried", "trials", "right", "refused", "signed anew", "faults"], rows, numbers=True)
        + f"\n{', '.join(f'`python -m {command}`' for command in commands)}; {seconds / 60:.0f} minutes on one core; "
        f"{origin(lines[-1:])}.\n"
    )


def _counts(kind: str, lines: list[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        if line["kind"] == kind:
            found.update(line["counts"])
    return found


#: Blocks of the pages by name.
BLOCKS = {"hardening": section}
