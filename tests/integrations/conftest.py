"""Two real processes, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """``ranks(function, *args)`` calls a function of a test module on two ranks and gives both results."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()
