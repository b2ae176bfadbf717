"""One cell in a process of its own: ``python -m nipq.compare.worker`` with the job as JSON on standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nipq.compare.record import CompareFolder, make_record
from nipq.errors import ConfigError, NipqError
from nipq.train.pipeline import run
from nipq.train.run_folder import write_text

if sys.platform != "win32":
    import fcntl


def run_job(job: Mapping[str, Any]) -> None:
    """Train a cell to its end, from its checkpoint where there is one, and write its record, whole or not at all.

    Args:
        job: ``folder``, ``grid``, ``cell`` (name, row, budget, seed), ``config`` and ``data``.

    Raises:
        ConfigError: If another process trains the cell, or a float cell that had to be trained again gives other
            numbers than its record.
        NipqError: Whatever the run refuses.
    """
    folder, name = CompareFolder(job["folder"]), job["cell"]["name"]
    with _alone(folder.path / "logs" / f"{name}.lock"):
        config = folder.located(job["config"], job["data"])
        results = run(config, folder.run(name).path, resume=True)
        known = folder.read(name)
        if known is None:
            record = make_record(folder, job["grid"], job["cell"], config)
            folder.record(name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder.record(name), json.dumps(record, indent=1) + "\n")
        elif known["results"]["states"] != results["states"]:
            raise ConfigError(
                f"{name} was trained again because its weights were gone, and came out with other numbers than its "
                f"record {folder.record(name)} (another machine or other versions?): the cells of this seed would not "
                "start from the same network; restore the weights, use another seed, or delete the records and run "
                "folders of this seed and train it again"
            )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a second process off the cell; the system lifts the lock when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"expected to be the only process that trains {path.stem}, found another one that holds {path}; "
                    "wait for it or stop it"
                ) from error
        yield


def main() -> int:
    """Do the job on standard input; what nipq refuses is one line, anything else keeps its traceback."""
    try:
        run_job(json.load(sys.stdin))
    except NipqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
