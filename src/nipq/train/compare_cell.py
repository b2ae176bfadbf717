"""Train one cell of a comparison: ``python -m nipq.train.compare_cell`` with the job as a line of JSON on its input.

The process ends when its input does: whoever started it holds the other end, and no cell trains on for a runner that is
gone. The next run continues from the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from nipq.errors import ConfigError, NipqError
from nipq.files import locked
from nipq.train.compare import CompareFolder
from nipq.train.config import TrainConfig
from nipq.train.pipeline import run
from nipq.train.records import Record, processor, seconds_per_step


def run_job(job: Mapping[str, Any]) -> None:
    """Train a cell to its end, from its checkpoint where there is one, and append its record.

    Args:
        job: ``folder``, ``grid``, ``cell`` (name, row, budget, seed), ``config`` and ``data``.

    Raises:
        ConfigError: if another process trains the cell, or a float cell that is trained again gives other numbers.
    """
    folder, name = CompareFolder(job["folder"]), job["cell"]["name"]
    with locked(folder.path / "logs" / f"{name}.lock", alone=f"trains {name}"):
        config = folder.located(job["config"], job["data"])
        results = run(config, folder.run(name).path, resume=True)
        known = folder.read().get(name)
        if known is None:
            folder.records.append(make_record(folder, job["grid"], job["cell"], config))
        # Other cells start from the float state; the 8-bit check after it is of no consequence to them.
        elif known["results"]["states"]["float"] != results["states"]["float"]:
            raise ConfigError(
                f"{name} was trained again because its weights were gone, and came out with other numbers than its "
                f"record in {folder.records.path} (another machine or other versions?): the cells of this seed would "
                "not start from the same network; restore the weights, use another seed, or delete the records and "
                "run folders of this seed and train it again"
            )


def make_record(folder: CompareFolder, grid: str, cell: Mapping[str, Any], config: TrainConfig) -> Record:
    """Everything about a finished cell that a table, a plot or a sceptic needs, free of this machine's paths."""
    place = folder.run(cell["name"])
    results, layers, environment = (
        json.loads(path.read_text(encoding="utf-8")) for path in (place.results, place.layers_json, place.environment)
    )
    rows = place.rows()
    # Soft bits [weight, activation] of every layer after the last search epoch, before they were frozen.
    search = [row for row in rows if row["stage"] == "search" and "layer_bits" in row]
    return {
        "grid": grid,
        "cell": dict(cell),
        "config": folder.portable(config),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": environment["cpu_threads"],
            "gpu": environment["cuda"],
        },
        "versions": {"python": environment["python"], **environment["packages"]},
        "results": results,
        "bops": sum(layer["bops"] for layer in layers),
        "learned_bits": dict(search[-1]["layer_bits"]) if search else {},
        "seconds_per_step": seconds_per_step(rows),
    }


def end_with(input_file: int, end: Callable[[int], object]) -> threading.Thread:
    """Call ``end(1)`` from a daemon thread once no process holds the other end of the pipe ``input_file``."""

    def watch() -> None:
        while os.read(input_file, 1024):
            pass
        end(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def main() -> int:
    """Do the job on standard input; a refusal of nipq is one line, anything else keeps its traceback."""
    job = json.loads(sys.stdin.readline())
    end_with(sys.stdin.fileno(), os._exit)
    try:
        run_job(job)
    except NipqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
