"""Sums, samples and decisions over two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nipq import distributed
from nipq.distributed.collectives import checksum
from nipq.errors import BudgetError, DistributedError
from tests.distributed.ranks import PATIENCE, Ranks


def test_without_a_group_nothing_happens() -> None:
    tensor = torch.ones(3)
    distributed.reduce_sum_([tensor])
    distributed.reduce_mean_([tensor])
    distributed.broadcast_([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.from_rank_zero(lambda: 5) == 5
    assert distributed.whole(tensor) is tensor is distributed.part(tensor)
    distributed.check_same_(nn.Linear(2, 2), "test")
    distributed.barrier("test")
    with distributed.all_or_none("test"):
        pass
    with pytest.raises(KeyError), distributed.all_or_none("test"):
        raise KeyError("a")


def test_samples_above_the_cap_are_thinned_evenly() -> None:
    sample = torch.arange(100.0)
    assert distributed.gather_samples(sample, 100) is not None
    thin = distributed.gather_samples(sample, 40)
    assert thin.tolist() == [float(3 * i) for i in range(34)]


def reductions() -> dict[str, Any]:
    own = distributed.rank()
    sums, means = [torch.full((2,), own + 1.0), torch.tensor([own], dtype=torch.int64)], [torch.tensor([[own + 1.0]])]
    first = [torch.full((2, 2), own + 3.0), torch.tensor([own == 0])]
    distributed.reduce_sum_(sums)
    distributed.reduce_mean_(means)
    least = torch.tensor([own + 1.0, float("inf"), -own])
    distributed.reduce_min_([least])
    distributed.broadcast_(first[:1])
    distributed.barrier("the end")
    return {
        "sums": [t.tolist() for t in sums],
        "means": [t.tolist() for t in means],
        "least": least.tolist(),
        "first": first[0].tolist(),
        "samples": distributed.gather_samples(torch.arange(2.0 + own) + 10 * own, 100).tolist(),
        "none on rank 0": distributed.gather_samples(torch.ones(own), 100).tolist(),
        "objects": distributed.gather_objects(own),
        "decision": distributed.from_rank_zero(distributed.rank),
        "seed": distributed.rank_seed(7),
    }


def test_both_ranks_get_the_same_numbers(ranks: Ranks) -> None:
    first, second = ranks(reductions)
    seeds = [found.pop("seed") for found in (first, second)]
    assert first == second
    assert first == {
        "sums": [[3, 3], [1]],
        "means": [[[1.5]]],
        "least": [1, float("inf"), -1],
        "first": [[3, 3], [3, 3]],
        "samples": [0, 1, 10, 11, 12],
        "none on rank 0": [1],
        "objects": [0, 1],
        "decision": 0,
    }
    assert seeds[0] == 7 != seeds[1]
    assert seeds[1] == ranks(distributed.rank_seed, 7)[1]


def refused() -> None:
    raise BudgetError("expected a budget")


def broken() -> None:
    raise RuntimeError("out of order")


def decide(name: str) -> None:
    distributed.from_rank_zero(globals()[name])


def test_an_error_of_rank_0_is_raised_everywhere(ranks: Ranks) -> None:
    for kind, error in ranks.outcomes(decide, "refused"):
        assert kind == "error"
        assert isinstance(error, BudgetError)
    first, second = ranks.outcomes(decide, "broken")
    assert isinstance(first[1], RuntimeError)
    assert isinstance(second[1], DistributedError)
    assert "expected a decision of rank 0, found that it failed: RuntimeError('out of order')" in str(second[1])


def fail_on_rank_1() -> None:
    with distributed.all_or_none("reading"):
        if distributed.rank() == 1:
            raise KeyError("no file")


def test_an_error_of_one_rank_ends_all(ranks: Ranks) -> None:
    first, second = ranks.outcomes(fail_on_rank_1)
    assert isinstance(second[1], KeyError)
    assert isinstance(first[1], DistributedError)
    assert "reading: expected every rank to succeed, found that rank 1 did not: 'no file'" in str(first[1])


def compare(what: str) -> str | None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    if distributed.rank() == 1:
        if what == "number":
            with torch.no_grad():
                model[0].bias[2] += 1e-7
        elif what == "order":
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight.flip(0))
        elif what == "shape":
            model[0] = nn.Linear(5, 3)
        elif what == "name":
            model[0].register_parameter("bias", None)
        elif what == "last":
            model.append(nn.Linear(3, 3))
        elif what == "statistics":
            model[1].running_mean += 1
    try:
        distributed.check_same_(model, "start")
    except DistributedError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("number", "found that the numbers in 0.bias differ between rank 0 and rank 1"),
        ("order", "found that the numbers in 0.weight differ between rank 0 and rank 1"),
        ("shape", "found that 0.weight is (3, 4) float32 on rank 0 and (3, 5) float32 on rank 1"),
        ("name", "found 0.bias on rank 0 where rank 1 has 1.weight"),
        ("last", "found nothing on rank 0 where rank 1 has 2.weight"),
    ],
)
def test_ranks_with_different_models_are_refused_on_every_rank(ranks: Ranks, what: str, message: str) -> None:
    first, second = ranks(compare, what)
    assert first == second
    assert message in first


@pytest.mark.parametrize("what", ["nothing", "statistics"])
def test_the_same_model_passes_and_running_statistics_may_differ(ranks: Ranks, what: str) -> None:
    assert ranks(compare, what) == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_a_checksum_sees_values_and_places_of_every_type(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 0, 1, 1]).to(dtype)
    changed, swapped = values.clone(), values[[1, 0, 2, 3]]
    changed[3] = 0
    assert len({int(checksum(t)) for t in (values, changed, swapped)}) == 3


def meet() -> None:
    distributed.barrier("the meeting", PATIENCE.total_seconds())


@pytest.mark.distributed
def test_a_rank_that_is_gone_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    pair = Ranks(tmp_path)
    try:
        pair(meet)
        pair.kill(1)
        ((kind, error),) = pair.survivors(meet).values()
        assert kind == "error"
        assert isinstance(error, DistributedError)
        assert "the meeting: expected all 2 ranks to take part, found on rank 0 that one did not" in str(error)
    finally:
        pair.close()
