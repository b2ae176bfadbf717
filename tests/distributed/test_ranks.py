"""The processes behind the other tests: no failure of one leaves the others waiting."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(tmp_path_factory.mktemp("pair"))
    yield group
    group.close()


def number() -> int:
    return dist.get_rank()


def fail_alone() -> None:
    if dist.get_rank() == 1:
        raise KeyError("alone")
    dist.barrier()


def die_alone() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    os.read(os.pipe()[0], 1)  # for ever


def test_an_error_of_one_rank_ends_those_that_wait_for_it(pair: Ranks) -> None:
    with pytest.raises(KeyError, match="alone"):
        pair(fail_alone)
    assert pair(number) == [0, 1]


def test_the_death_of_one_rank_ends_the_others(pair: Ranks) -> None:
    with pytest.raises(RuntimeError, match="rank 1 ended with exit status 3 instead of an answer"):
        pair(die_alone)
    with pytest.raises(RuntimeError, match="rank 1 ended with exit status 3 instead of an answer"):
        pair.outcomes(die_alone)
    assert pair(number) == [0, 1]


def set_variable() -> None:
    os.environ["RANK"] = "5"


def variable() -> str | None:
    return os.environ.get("RANK")


def test_variables_are_those_of_one_call(pair: Ranks) -> None:
    pair(set_variable)
    assert pair(variable) == [None, None]
