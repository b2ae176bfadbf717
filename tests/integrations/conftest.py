"""Two real processes, started once for all tests here, and a Trainer of transformers by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """``ranks(function, *args)`` calls a function of a test module on two ranks and gives both results."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """``build(...)`` makes the trainer of ``tiny_bert`` in a folder of the test."""
    from tests.integrations.tiny_bert import make_trainer  # needs transformers, which other tests here do not

    return partial(make_trainer, tmp_path)
