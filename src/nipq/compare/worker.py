"""One cell in a process of its own: ``python -m nipq.compare.worker`` with the job as a line of JSON on its input.

The process ends when its input does: whoever started it holds the other end, and nobody trains on for a runner that is
gone. The next run continues from the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
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
        # Other cells start from the float state; the 8-bit check after it is of no consequence to them.
        elif known["results"]["states"]["float"] != results["states"]["float"]:
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


def end_with(input_file: int, end: Callable[[int], object]) -> threading.Thread:
    """Call ``end(1)`` from another thread once nobody holds the other end of a pipe.

    Args:
        input_file: File descriptor of the pipe's reading end.
        end: Ends the process.

    Returns:
        The thread; it does not keep the process alive.
    """

    def watch() -> None:
        while os.read(input_file, 1024):
            pass
        end(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def main() -> int:
    """Do the job on standard input; what nipq refuses is one line, anything else keeps its traceback."""
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
