"""Training runs: from a config to a folder with a verified mixed-precision model."""

from __future__ import annotations

from nipq.train.config import TrainConfig, load_config
from nipq.train.pipeline import run

__all__ = ["TrainConfig", "load_config", "run"]
