"""Training runs small enough for two processes in a test, stopped where a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from nipq.train import checkpoint, pipeline
from nipq.train.config import check_config
from tests.distributed.common_noise import common_noise as common_noise_

SETTINGS: dict[str, Any] = {
    "model": {"factory": "tests.distributed.models:digits"},
    "data": {"kind": "digits", "batch_size": 32, "train_limit": 192},
    "budget": {"average_bits": {"weights": 4, "activations": 4}},
    "stages": {"float": {"epochs": 2}, "search": {"epochs": 4}, "finetune": {"epochs": 3}},  # 54 steps
    "optimizer": {"lr": 0.02, "bits_lr": 0.1},
    "batchnorm_batches": 2,
    "calibration_batches": 2,
    "allocation": "middle",
    "ema_decay": 0.8,
    "device": "cpu",
    "threads": 1,
    "checkpoint_every": 4,
}


class StopError(Exception):
    """Ends a run as a kill would."""


@contextmanager
def patched(*, common_noise: bool, saves: int | None = None) -> Iterator[None]:
    """Leave out the end of a run (deployment and plots); let it draw and stop as asked.

    Args:
        common_noise: Every sample and weight gets the noise that it has in one process.
        saves: Stop after so many checkpoints.
    """
    written: list[Path] = []
    save = checkpoint.Checkpoint.save

    def counted(self: checkpoint.Checkpoint, path: Path) -> None:
        save(self, path)
        written.append(path)
        if len(written) == saves:
            raise StopError

    with pytest.MonkeyPatch.context() as patch, common_noise_() if common_noise else nullcontext():
        patch.setattr(pipeline, "finish", lambda trainer, *_: {"states": trainer.progress.states})
        patch.setattr(checkpoint.Checkpoint, "save", counted)
        if common_noise:
            patch.setattr("nipq.train.trainer.rank_seed", lambda seed: seed)
        yield


def train(
    folder: Path, *, common_noise: bool = True, saves: int | None = None, resume: bool = False, **changes: Any
) -> dict[str, Any]:
    """A run, to its end or to one of its checkpoints; what its folder then holds."""
    settings = {**SETTINGS, **changes}
    with patched(common_noise=common_noise, saves=saves):
        try:
            pipeline.run(check_config(settings), folder, resume=resume, quiet=True)
        except StopError:
            return {}
    found = checkpoint.Checkpoint.load(folder / "checkpoint.pt")
    return {"model": found.model, "states": found.progress.states, "steps": found.progress.steps_total}


def in_rank(folder: Path, keywords: dict[str, Any]) -> dict[str, Any]:
    """:func:`train` for a worker."""
    return train(folder, **keywords)


def attempt(function: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test looks at the text
        function()
    return f"{type(caught.value).__name__}: {caught.value}"
