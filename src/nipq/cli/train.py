"""``nipq train``: a config and a folder in, a verified model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nipq.cli.output import FAILURE, JsonFlag, TargetOption, answer, reporting
from nipq.cli.results import results_table
from nipq.train.config import load_config, parse_overrides
from nipq.train.parallel import is_first
from nipq.train.pipeline import run


def train(
    config: Annotated[Path, typer.Argument(help="YAML config; see configs/.")],
    folder: Annotated[Path, typer.Option("--run", help="Run folder; new, or with --resume an old one.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="Folder of the data (overrides data.path).")] = None,
    target: TargetOption = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value; overrides a field.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train, search bits under a budget, freeze, fine-tune, pack and verify.

    Under torchrun or accelerate launch all processes share one run.
    """
    with reporting(as_json):
        overrides = parse_overrides(assignments or [])
        if data is not None:
            overrides["data.path"] = data
        if target is not None:
            overrides["quantization.target"] = target
        results = run(load_config(config, overrides), folder, resume=resume, quiet=quiet or as_json)
        if is_first() and as_json:
            answer({"run": str(folder), **results}, ok=results["verified"])
        elif is_first():
            Console().print(results_table(results, title=str(folder)))
        if not results["verified"]:
            raise typer.Exit(FAILURE)
