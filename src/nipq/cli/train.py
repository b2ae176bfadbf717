"""``nipq train``: a config and a folder in, a proven model out."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nipq.cli.output import answer
from nipq.cli.results import results_table
from nipq.train.config import load_config, parse_overrides
from nipq.train.parallel import is_first
from nipq.train.pipeline import run


def run_train(
    config: Path,
    folder: Path,
    *,
    resume: bool,
    data: str | None,
    target: str | None,
    assignments: list[str],
    quiet: bool,
    as_json: bool,
) -> bool:
    """Train as a config file says and print the results.

    Args:
        config: YAML file.
        folder: Run folder.
        resume: Continue the run in the folder.
        data: Replaces ``data.path``.
        target: Replaces ``quantization.target``.
        assignments: ``key=value`` texts that replace fields.
        quiet: No progress bar.
        as_json: Print JSON.

    Returns:
        Whether the deployed model was proven equal to the trained one.
    """
    overrides = parse_overrides(assignments)
    if data is not None:
        overrides["data.path"] = data
    if target is not None:
        overrides["quantization.target"] = target
    results = run(load_config(config, overrides), folder, resume=resume, quiet=quiet)
    if not is_first():
        return bool(results["verified"])
    if as_json:
        answer({"run": str(folder), **results}, ok=results["verified"])
    else:
        Console().print(results_table(results, title=str(folder)))
    return bool(results["verified"])
