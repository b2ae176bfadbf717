"""``nipq demo``: the whole promise on data that need no download, in about a minute on two cores."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nipq.cli.output import answer
from nipq.cli.results import results_table
from nipq.train.config import check_config
from nipq.train.pipeline import run

BITS = 4.0
"""Average bits of weights and of activations that the demo promises."""
MOST_LOST = 1.0
"""Points of test accuracy below float that the promise allows."""

DEMO: dict[str, Any] = {
    "model": {"factory": "nipq.train.models:digits_net"},
    "data": {"kind": "digits", "batch_size": 64, "validation": 0.1},
    "budget": {"average_bits": {"weights": BITS, "activations": BITS}},
    "stages": {"float": {"epochs": 30}, "search": {"epochs": 15}, "finetune": {"epochs": 5, "lr": 0.01}},
    "optimizer": {"lr": 0.05, "weight_decay": 0.0005, "warmup_epochs": 1, "final": 0.01},
    "batchnorm_batches": 16,
    "threads": 1,
}
"""The same settings as ``configs/digits.yaml``."""


def run_demo(folder: Path | None, *, seed: int, quiet: bool, as_json: bool) -> bool:
    """Run the demo and say whether the promise was kept.

    Args:
        folder: Run folder, or ``None`` for a temporary one.
        seed: Of the whole run.
        quiet: No progress bar.
        as_json: Print JSON.

    Returns:
        Whether the bits are at or below 4.0/4.0, the accuracy is within a point of float, and verify holds.
    """
    started = time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix="nipq-demo-")) if folder is None else folder
    results = run(check_config({**DEMO, "seed": seed}), place, quiet=quiet)
    checks = promises(results)
    seconds = time.perf_counter() - started
    if as_json:
        answer({"run": str(place), "promises": checks, "wall_seconds": seconds, **results}, ok=all(checks.values()))
        return all(checks.values())
    console = Console()
    console.print(results_table(results, title="nipq demo: digits, 4.0 / 4.0 average bits"))
    for text, kept in checks.items():
        console.print(f"[green]kept[/]    {text}" if kept else f"[bold red]BROKEN[/]  {text}")
    console.print(f"{seconds:.1f} s in all; everything is in {place}", soft_wrap=True)
    return all(checks.values())


def promises(results: dict[str, Any]) -> dict[str, bool]:
    """What the demo promises, and whether the results keep it.

    Args:
        results: As in ``results.json``.

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
