"""Batch norms over all ranks: their statistics measured anew, and synchronised while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import nipq
from nipq.distributed import rank, world_size
from nipq.distributed.sync_batchnorm import sync_, synced, unsync_
from tests.distributed.models import batches, close, net, own, prepared, same, state
from tests.distributed.ranks import Ranks

BUDGET = nipq.AverageBits(weights=4, activations=4)


def reestimated() -> dict[str, Tensor]:
    model = prepared()
    nipq.reestimate_bn_(model, own(batches(5, seed=3)), 4)
    return state(model)


def test_batch_norms_are_reestimated_as_by_one_process(ranks: Ranks) -> None:
    first, second = ranks(reestimated)
    same(first, second)
    close(reestimated(), first, 1e-5)
    assert first["1.num_batches_tracked"].item() == 4


def uneven() -> dict[str, Tensor]:
    model = prepared()
    nipq.reestimate_bn_(model, own(batches(5, seed=3))[: 5 - rank()])
    return state(model)


def test_the_rank_with_the_fewest_batches_decides(ranks: Ranks) -> None:
    first, second = ranks(uneven)
    same(first, second)
    assert first["1.num_batches_tracked"].item() == 4


def trained_forward(sizes: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Gradients of a float net with synchronised batch norms, averaged over samples, and its statistics."""
    model = net().train()
    sync_(model)
    (x, y), start = batches(1)[0], sizes[0] * rank()
    part = slice(start, start + sizes[rank()]) if world_size() > 1 else slice(None)
    cross_entropy(model(x[part]), y[part], reduction="sum").backward()
    gradients = [p.grad for p in model.parameters()]
    nipq.distributed.reduce_sum_(gradients)
    found = {name: p.grad for name, p in model.named_parameters()}
    unsync_(model)
    assert not any("forward" in module.__dict__ for module in model)
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("sizes", [(8, 8), (12, 4)])
def test_synchronised_batch_norms_train_as_in_one_process(ranks: Ranks, sizes: tuple[int, int]) -> None:
    first, second = ranks(trained_forward, sizes)
    same(first, second)
    close(trained_forward(), first, 1e-5)


def test_without_ranks_batch_norms_are_left_alone() -> None:
    model = net()
    with synced(model):
        assert not any("forward" in module.__dict__ for module in model)


def in_evaluation() -> tuple[Tensor, Tensor]:
    model = net().eval()
    x = torch.randn(4, 3, 6, 6)
    before = model(x)
    with synced(model):
        return before, model(x)


def test_in_evaluation_a_synchronised_batch_norm_is_an_ordinary_one(ranks: Ranks) -> None:
    for before, after in ranks(in_evaluation):
        assert torch.equal(before, after)
