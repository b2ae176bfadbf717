"""A Trainer of transformers by one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """``build(...)`` makes the trainer of ``tiny_bert`` in a folder of the test."""
    from tests.integrations.tiny_bert import make_trainer  # needs transformers, which other tests here do not

    return partial(make_trainer, tmp_path)
