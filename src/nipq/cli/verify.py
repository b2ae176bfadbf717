"""``nipq verify``: compare a finished run's files, and those exported from it, with its trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nipq.cli.output import FAILURE, JsonFlag, answer, reporting
from nipq.train.pipeline import verify_run
from nipq.train.run_folder import RunFolder


def verify_files(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Exported files: .nipq.safetensors, .onnx, .npz, .pt2.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run's packed model and exported files with its trained model, layer by layer in integer codes."""
    with reporting(as_json):
        outcome = verify_run(RunFolder(folder), files or [])
        if as_json:
            answer(outcome.to_dict(), ok=bool(outcome))
        else:
            typer.echo(str(outcome))
        if not outcome:
            raise typer.Exit(FAILURE)
