"""``nipq verify``: prove a finished run again, from its files."""

from __future__ import annotations

from pathlib import Path

import typer

from nipq.cli.output import answer
from nipq.train.finish import verify_run
from nipq.train.run_folder import RunFolder


def verify_folder(folder: Path, *, as_json: bool) -> bool:
    """Compare the packed model of a run with its trained model and print what was found.

    Args:
        folder: Run folder.
        as_json: Print JSON.

    Returns:
        Whether every rung holds.
    """
    outcome = verify_run(RunFolder(folder))
    if as_json:
        answer(outcome.to_dict(), ok=bool(outcome))
    else:
        typer.echo(str(outcome))
    return bool(outcome)
