"""``nipq train`` and ``nipq demo``: a config and a folder in, a verified model out."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nipq.cli.output import FAILURE, JsonFlag, TargetOption, answer, show
from nipq.cli.reporting import reporting
from nipq.cli.show import results_table
from nipq.train.config import check_config, load_config, parse_overrides
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
            show(results_table(results, title=str(folder)))
        if not results["verified"]:
            raise typer.Exit(FAILURE)


#: Average bits of weights and of activations that the demo promises.
BITS = 4.0
#: Points of test accuracy below float that the promise allows.
MOST_LOST = 1.0

#: The same settings as ``configs/digits.yaml``.
DEMO: dict[str, Any] = {
    "model": {"factory": "nipq.train.models:digits_net"},
    "data": {"kind": "digits", "batch_size": 64, "validation": 0.1},
    "budget": {"average_bits": {"weights": BITS, "activations": BITS}},
    "stages": {"float": {"epochs": 30}, "search": {"epochs": 15}, "finetune": {"epochs": 5, "lr": 0.01}},
    "optimizer": {"lr": 0.05, "weight_decay": 0.0005, "warmup_epochs": 1, "final": 0.01},
    "batchnorm_batches": 16,
    "threads": 1,
}


def demo(
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder; a temporary one if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole run.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the whole promise on digits, offline: train, search 4.0/4.0 bits, fine-tune, pack, verify."""
    with reporting(as_json):
        started = time.perf_counter()
        place = Path(tempfile.mkdtemp(prefix="nipq-demo-")) if folder is None else folder
        results = run(check_config({**DEMO, "seed": seed}), place, quiet=quiet or as_json)
        checks, seconds = promises(results), time.perf_counter() - started
        kept = all(checks.values())
        if as_json:
            answer({"run": str(place), "promises": checks, "wall_seconds": seconds, **results}, ok=kept)
        else:
            show(
                results_table(results, title="nipq demo: digits, 4.0 / 4.0 average bits"),
                *(f"{'kept' if found else 'BROKEN':8}{text}" for text, found in checks.items()),
                f"{seconds:.1f} s in all; everything is in {place}",
            )
        if not kept:
            raise typer.Exit(FAILURE)


def promises(results: dict[str, Any]) -> dict[str, bool]:
    """The demo's promises, and whether the results keep them.

    Args:
        results: as in ``results.json``.

    Returns:
        Truth by promise.
    """
    states, bits = results["states"], results["average_bits"]
    lost = states["float"]["test"]["accuracy"] - states["finetuned"]["test"]["accuracy"]
    return {
        f"average bits at or below {BITS} / {BITS}": bits["weights"] <= BITS and bits["activations"] <= BITS,
        f"test accuracy at most {MOST_LOST} point below float": lost <= MOST_LOST,
        "deployed model equals the trained one in every code": results["verified"],
    }
