"""Kill ``nipq train`` at named places, continue it, and compare with a run that was never killed.

A child process trains with one function replaced by one that kills the process at a given call, before or after its
work; nothing can be tidied up. A second one continues with ``resume``. The results, bits, packed model and metrics have
to be those of a run without a break, but for its times.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.hardening.trials import FAULT, REFUSED, RIGHT, Outcome, forget, parser, run
from nipq.errors import NipqError
from nipq.train import checkpoint, pipeline, run_folder
from nipq.train.config import check_config
from nipq.train.trainer import Trainer

#: The run: digits, all stages.
CONFIG: dict[str, Any] = {
    "model": {"factory": "nipq.train.models:digits_net"},
    "data": {"kind": "digits", "batch_size": 128, "train_limit": 512},
    "budget": {"average_bits": {"weights": 4.0, "activations": 4.0}},
    "stages": {"float": {"epochs": 1}, "search": {"epochs": 2}, "finetune": {"epochs": 1}},
    "calibration_batches": 2, "batchnorm_batches": 2, "verify_batches": 1, "checkpoint_every": 2, "threads": 1,
}  # fmt: skip

#: Places: name, what holds the function, its name, and the calls at which the process dies.
PLACES: list[tuple[str, Any, str, int]] = [
    ("first start", run_folder, "write_text", 2),
    ("first start", pipeline.RunFolder, "start", 1),
    ("checkpoint", checkpoint.Checkpoint, "save", 8),
    ("checkpoint", checkpoint, "seal", 4),
    ("metrics", pipeline.RunFolder, "append_row", 3),
    ("allocation", Trainer, "advance", 1),
    ("freeze", Trainer, "close_epoch", 2),
    ("fine-tune", Trainer, "follow", 3),
    ("packing", pipeline, "save", 1),
    ("packing", pipeline, "convert", 1),
    ("verify", pipeline, "verify", 1),
    ("verify", pipeline, "write_text", 3),
]
#: All of them: place, what holds the function, its name, the call, whether before its work.
KILLS = [
    (place, owner, name, call, before)
    for place, owner, name, calls in PLACES
    for call in range(1, calls + 1)
    for before in (True, False)
]


def killing(function: Callable[..., Any], call: int, *, before: bool) -> Callable[..., Any]:
    """The function, but the process dies at one of its calls.

    Args:
        function: to be replaced.
        call: the call, from 1.
        before: whether before the function's work.
    """
    count = [0]

    def killed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        count[0] += 1
        if count[0] == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*args, **kwargs)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return killed


def in_a_child(work: Callable[[], None]) -> int:
    """Run work in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except NipqError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, *, resume: bool) -> None:
    """One run, or the rest of it."""
    torch.set_num_threads(1)
    pipeline.run(check_config(CONFIG), folder, resume=resume, quiet=True)


def left(folder: Path) -> dict[str, Any]:
    """The files of a finished run, without its times."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results.pop("seconds")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("seconds")
    layers = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    packed = (folder / "model.nipq.safetensors").read_bytes()
    return {"results": results, "rows": rows, "layers": layers, "packed": packed}


def trial_of(place: Path) -> Callable[[int], Outcome]:
    """A trial: one kill of :data:`KILLS`.

    Args:
        place: for the folders; holds the run without a break.
    """
    whole = place / "whole"
    if in_a_child(lambda: train(whole, resume=False)):
        raise RuntimeError("the run without a break failed")
    expected = left(whole)

    def trial(seed: int) -> Outcome:
        _, owner, name, call, before = KILLS[seed]
        folder = place / "killed"
        shutil.rmtree(folder, ignore_errors=True)

        def first() -> None:
            setattr(owner, name, killing(getattr(owner, name), call, before=before))
            train(folder, resume=False)

        status = in_a_child(first)
        if status not in (0, -signal.SIGKILL):
            return FAULT, f"the killed run ended with status {status}"
        status = in_a_child(lambda: train(folder, resume=True))
        if status == 3:
            return REFUSED, ""
        if status:
            return FAULT, f"continuing ended with status {status}"
        found = left(folder)
        wrong = [key for key in expected if found[key] != expected[key]]
        return (FAULT, f"accepted, and its {', '.join(wrong)} are others") if wrong else (RIGHT, "")

    return trial


def main() -> None:
    """Run all kills, or one."""
    arguments = parser(__doc__, ["kill"]).parse_args()
    if arguments.anew:
        forget(["kill"])
    with tempfile.TemporaryDirectory() as name:
        trial = trial_of(Path(name))
        if arguments.seed is not None:
            print(KILLS[arguments.seed][0], *KILLS[arguments.seed][2:])
            print(trial(arguments.seed))
        else:
            print(f"kill: {dict(run('kill', trial, len(KILLS), 12))}")


if __name__ == "__main__":
    main()
