"""Sentence on how often a frozen model exceeded its budget, from the record; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

from experiments.shown import lines_of, origin


def section() -> str:
    """The count, and how it was made."""
    (record,) = lines_of(Path(__file__).parent / "results.jsonl")
    return (
        f"{record['pairs']} random pairs of model and budget: {record['overshoots']} above the budget. "
        f"`{record['command']}`; {origin([record])}.\n"
    )


#: Blocks of the pages by name.
BLOCKS = {"budgets-kept": section}
