"""FSDP2: weights sharded, quantizers whole, the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import nipq
from nipq.distributed import is_sharded, part, rank, whole, world_size
from nipq.distributed.fsdp import average_gradients_, quantizer_parameters, shard_
from nipq.errors import ConfigError, DistributedError
from nipq.prepare.layer_table import quantizers, set_phase_
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import drop_frozen_
from nipq.qat.oscillation import Oscillations
from nipq.qat.search import Search
from tests.distributed.common_noise import common_noise
from tests.distributed.ranks import Ranks

BUDGET = nipq.AverageBits(weights=4, activations=4)


class Block(nn.Module):
    """Two layers around a ReLU, added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Net(nn.Module):
    """Blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def prepared(**settings: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nipq.prepare_(Net(), torch.zeros(1, 6), nipq.Config(**settings))
    return nipq.calibrate_(model, [torch.randn(64, 6)], 1)


def data(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(16, 6, generator=generator) for _ in range(steps)]


def trained(steps: int, accumulate: int = 1, **settings: Any) -> dict[str, Any]:
    """A search with weight average, a freeze, and rounding; every sample has the noise that one process gives it."""
    ranks, own = world_size(), rank()
    model = prepared(**settings)
    if ranks > 1:
        shard_(model)
        assert is_sharded(model.stem.parametrizations.weight.original)
        assert not any(map(is_sharded, quantizer_parameters(model)))
    optimizer = torch.optim.SGD(nipq.param_groups(model, lr=0.05), momentum=0.9)
    search = Search(model, BUDGET, steps, optimizer=optimizer)
    average = WeightAverage(model, 0.9)
    with common_noise():
        torch.manual_seed(3)
        for place, x in enumerate(data(steps * accumulate)):
            loss = model(x.chunk(ranks)[own]).square().mean() + search.penalty()
            (loss / accumulate).backward()
            if (place + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                search.step()
                average.update(model)
    found = {f"average.{name}": whole(tensor) for name, tensor in average.state_dict()["average"].items()}
    bits = nipq.freeze_bits_(model, search.budget).bits
    drop_frozen_(optimizer, model)
    set_phase_(model, "round")
    for x in data(4):
        model(x.chunk(ranks)[own]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found |= {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}
    nipq.calibrate_(model, [data(1)[0].chunk(ranks)[own]], 1)
    found |= {f"calibrated.{q.name}": q.alpha.detach().clone() for q in quantizers(model)}
    return {"state": found, "bits": bits}


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"granularity": "channel"}])
def test_a_sharded_search_is_that_of_one_process(ranks: Ranks, settings: dict[str, Any]) -> None:
    first, second = ranks(in_rank, settings)
    expected = trained(30, **settings)
    assert first["bits"] == second["bits"] == expected["bits"]
    assert first["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def in_rank(settings: dict[str, Any]) -> dict[str, Any]:
    return trained(30, **settings)


def sharded_too_far() -> None:
    model = prepared()
    fully_shard(model)
    shard_(model)


def test_sharded_quantizers_are_refused(ranks: Ranks) -> None:
    for _, error in ranks.outcomes(sharded_too_far):
        assert isinstance(error, DistributedError)
        assert "expected every rank to hold clipping ranges and bit-widths whole, found stem.parametriz" in str(error)
        assert str(error).endswith("and call nipq.distributed.fsdp.average_gradients_(model) after it.")


def left_alone() -> None:
    model = prepared()
    fully_shard(model, ignored_params=set(quantizer_parameters(model)))
    Search(model, BUDGET, 10)


def test_quantizers_whose_gradients_nobody_averages_are_refused(ranks: Ranks) -> None:
    for _, error in ranks.outcomes(left_alone):
        assert isinstance(error, DistributedError)
        assert "stem.weight: expected its gradients to be averaged over ranks" in str(error)


def by_hand() -> list[list[float]]:
    model = prepared()
    for module in (*model.blocks, model):
        fully_shard(module, ignored_params=set(quantizer_parameters(model)))
    average_gradients_(model)
    model(data(1)[0] * (1 + rank())).square().mean().backward()
    return [parameter.grad.tolist() for parameter in quantizer_parameters(model) if parameter.grad is not None]


def test_what_the_message_advises_averages_gradients(ranks: Ranks) -> None:
    first, second = ranks(by_hand)
    assert first == second != []


def test_a_backward_pass_that_failed_does_not_end_the_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[int] = []
    monkeypatch.setattr("nipq.distributed.fsdp.reduce_mean_", lambda gradients: averaged.append(len(gradients)))
    model = prepared()
    average_gradients_(model)

    def fail(_gradient: Tensor) -> None:
        raise ValueError("out of luck")

    x = data(1)[0].requires_grad_()
    x.register_hook(fail)
    with pytest.raises(ValueError, match="out of luck"):
        model(x).sum().backward()
    assert averaged == []
    model(data(1)[0]).sum().backward()
    assert averaged == [sum(parameter.requires_grad for parameter in quantizer_parameters(model))]


def watched() -> None:
    Oscillations(shard_(prepared()), 10)


def test_sharded_weights_are_not_watched_for_oscillations(ranks: Ranks) -> None:
    for _, error in ranks.outcomes(watched):
        assert isinstance(error, ConfigError)
        assert "stem.weight: expected a whole weight to watch for oscillations, found a sharded one" in str(error)


def test_without_a_group_nothing_can_be_sharded() -> None:
    with pytest.raises(DistributedError, match="shard_: expected a process group, found none"):
        shard_(prepared())


def parts() -> tuple[list[int], list[int]]:
    model = shard_(prepared())
    weight = model.stem.parametrizations.weight.original
    return list(weight.shape), list(part(weight).shape)


def test_each_rank_holds_its_part(ranks: Ranks) -> None:
    assert ranks(parts) == [([8, 6], [4, 6])] * 2
