"""Training runs: from a config to a folder with a proven mixed-precision model."""

from __future__ import annotations

from nipq.train.config import TrainConfig
from nipq.train.config_file import load_config
from nipq.train.pipeline import run

__all__ = ["TrainConfig", "load_config", "run"]
