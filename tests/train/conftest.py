"""A run small enough for a test: a narrow net on some of the digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nipq.train.config import TrainConfig, check_config
from nipq.train.pipeline import run
from nipq.train.trainer import Trainer

SMALL: dict[str, Any] = {
    "model": {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 8}},
    "data": {"kind": "digits", "batch_size": 32, "train_limit": 512},
    "budget": {"average_bits": {"weights": 4, "activations": 4}},
    "stages": {"float": {"epochs": 4}, "search": {"epochs": 3}, "finetune": {"epochs": 1, "lr": 0.01}},
    "optimizer": {"lr": 0.05, "weight_decay": 1e-4, "warmup_epochs": 1},
    "batchnorm_batches": 3,
    "calibration_batches": 2,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def make_config() -> Callable[..., TrainConfig]:
    """Build the small config with some sections replaced."""
    return lambda **changes: check_config({**SMALL, **changes})


@pytest.fixture
def until() -> Callable[[Trainer, str], Trainer]:
    """Go on to a stage, through whole stages before it."""

    def go(trainer: Trainer, name: str) -> Trainer:
        while trainer.progress.stage != name:
            stage = trainer.progress.stage
            for _ in range(trainer.epochs):
                for batch in trainer.batches():
                    trainer.step(*batch)
                    if trainer.progress.step == len(trainer.train):
                        trainer.close_epoch()
                    trainer.follow()
            if trainer.progress.stage == stage:
                trainer.advance()
        return trainer

    return go


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(check_config(SMALL), folder, quiet=True)
    return folder
