"""``nipq verify``: prove a finished run again, from its files and what was exported from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from nipq.cli.output import answer
from nipq.train.pipeline import verify_run
from nipq.train.run_folder import RunFolder


def verify_folder(folder: Path, files: Sequence[Path] = (), *, as_json: bool) -> bool:
    """Compare the packed model of a run, and files exported from it, with its trained model; print what was found.

    Args:
        folder: Run folder.
        files: Exported files.
        as_json: Print JSON.

    Returns:
        Whether every rung holds.
    """
    outcome = verify_run(RunFolder(folder), files)
    if as_json:
        answer(outcome.to_dict(), ok=bool(outcome))
    else:
        typer.echo(str(outcome))
    return bool(outcome)
