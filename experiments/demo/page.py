"""Table of the demo over seeds, from its record; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

from experiments.shown import lines_of, origin, spread, table

STATES = ("float", "frozen", "bn", "finetuned")


def section() -> str:
    """Digits: the promises of ``nipq demo``, over seeds."""
    (record,) = lines_of(Path(__file__).parent / "results.jsonl")
    runs = record["runs"]
    scores = [spread([run["states"][state]["test"]["accuracy"] for run in runs]) for state in STATES]
    most = [max(run["average_bits"][side] for run in runs) for side in ("weights", "activations")]
    kept = sum(all(run["promises"].values()) for run in runs)
    headings = ["seeds", "float", "frozen", "+ BN re-estimated", "+ fine-tuned", "average bits W/A, at most"]
    row = [len(runs), *scores, f"{most[0]:.3f}/{most[1]:.3f}", f"{kept} of {len(runs)}"]
    longest = f"{max(run['wall_seconds'] for run in runs):.0f} s"
    return (
        table([*headings, "every promise kept", "wall time, at most"], [[*row, longest]])
        + "\nDigits, 4.0 / 4.0 average bits. Test accuracy in per cent, mean ± standard deviation. "
        f"`{record['command']}`; {origin([record])}.\n"
    )


#: Blocks of the pages by name.
BLOCKS = {"digits": section}
