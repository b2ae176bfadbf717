"""Steps that all ranks take together give what one process gives for the same global batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nipq
from nipq.budget import sensitivity
from nipq.budget.hawq import allocate_
from nipq.distributed import rank, world_size
from nipq.distributed.fsdp import shard_
from nipq.errors import BudgetError, ConfigError, DistributedError
from nipq.prepare.batches import BatchReader
from nipq.prepare.layer_table import quantizers
from nipq.qat.ema import WeightAverage
from nipq.qat.oscillation import Oscillations
from nipq.qat.search import Search
from tests.distributed.models import batches, close, loss_of, own, prepared, same, state
from tests.distributed.ranks import Ranks

BUDGET = nipq.AverageBits(weights=4, activations=4)


# ---------------------------------------------------------------------- calibration


def calibrated(count: int = 4) -> dict[str, Tensor]:
    model = prepared(calibrated=False)
    nipq.calibrate_(model, own(batches(count)), batches=count)
    return state(model)


def test_calibration_is_that_of_one_process(ranks: Ranks) -> None:
    first, second = ranks(calibrated)
    same(first, second)
    close(calibrated(), first, 1e-6)


def test_calibration_takes_the_sample_that_one_process_takes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few values of each input are kept, so that another choice of them would show."""
    first, _ = ranks(sparsely)
    monkeypatch.setattr("nipq.qat.calibrate.SAMPLE_SIZE", 64)
    close(calibrated(), first, 1e-6)


def sparsely() -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nipq.qat.calibrate.SAMPLE_SIZE", 64)
        return calibrated()


def own_data() -> dict[str, Tensor]:
    model = prepared(calibrated=False)
    nipq.calibrate_(model, [x * (1 + rank()) for x, _ in batches(2 + rank(), seed=rank())], batches=3)
    return state(model)


def test_ranks_with_data_of_their_own_still_agree(ranks: Ranks) -> None:
    same(*ranks(own_data))


def unlucky() -> None:
    model = prepared(calibrated=False)
    nipq.calibrate_(model, own(batches(2)) if rank() == 0 else [])


def test_an_empty_loader_on_one_rank_ends_calibration_on_all(ranks: Ranks) -> None:
    first, second = ranks.outcomes(unlucky)
    assert isinstance(second[1], ConfigError)
    assert isinstance(first[1], DistributedError)
    assert "calibrate_: expected every rank to succeed, found that rank 1 did not: calibrate_: expected at" in str(
        first[1]
    )


def torn(step: str) -> None:
    """The second batch of rank 1 cannot be read; a ``sharded`` model needs all ranks for a forward pass."""
    model = prepared(norm=step == "batch norm")

    def loader() -> Iterator[Tensor]:
        for place, (x, _) in enumerate(own(batches(3))):
            if place == 1 and rank() == 1:
                raise OSError("a torn file")
            yield x

    if step == "sharded":
        shard_(model)
    if step == "batch norm":
        nipq.reestimate_bn_(model, loader())
    else:
        nipq.calibrate_(model, loader())


@pytest.mark.parametrize("step", ["whole", "sharded", "batch norm"])
def test_a_loader_that_fails_on_one_rank_ends_the_step_on_all(ranks: Ranks, step: str) -> None:
    first, second = ranks.outcomes(torn, step)
    assert isinstance(second[1], OSError)
    assert isinstance(first[1], DistributedError)
    assert "expected every rank to succeed, found that rank 1 did not: a torn file" in str(first[1])


def unevenly_sharded() -> dict[str, Tensor]:
    model = shard_(prepared(norm=False, calibrated=False))
    nipq.calibrate_(model, own(batches(3))[: 3 - rank()], batches=3)
    return {quantizer.name: quantizer.alpha.detach().clone() for quantizer in quantizers(model)}


def test_sharded_models_are_calibrated_with_the_fewest_batches(ranks: Ranks) -> None:
    same(*ranks(unevenly_sharded))


class Anything(nn.Module):
    def forward(self, **inputs: object) -> None:
        """Never called."""


def reader() -> BatchReader:
    return BatchReader(Anything(), purpose="reading")


def deep() -> int:
    """A batch whose first tensor lies within a list."""
    given: list[object] = [{"pixels": ([torch.zeros(3 + rank(), 2)], "text")}]
    ((_, _, share),) = reader().in_step(given)
    return round(share * (3 + rank()))


def test_samples_are_counted_however_deep_they_lie(ranks: Ranks) -> None:
    assert ranks(deep) == [7, 7]
    for _, error in ranks.outcomes(empty):
        assert isinstance(error, ConfigError)
        assert "reading, batch 0: expected batches with tensors that the model takes, found dict of 'text'" in str(
            error
        )


def empty() -> None:
    next(reader().in_step([{"text": "none"}]))


def different(step: str) -> None:
    model = prepared()
    with torch.no_grad():
        model[0].bias.add_(rank())
    if step == "calibrate":
        nipq.calibrate_(model, own(batches(1)))
    elif step == "search":
        Search(model, BUDGET, 10)
    elif step == "freeze":
        nipq.freeze_bits_(model, BUDGET)
    elif step == "batch norm":
        nipq.reestimate_bn_(model, own(batches(1)))
    elif step == "start":
        nipq.allocate_bits_(model, own(batches(1)), BUDGET, cross_entropy)
    else:
        allocate_(model, own(batches(1)), cross_entropy, BUDGET)


@pytest.mark.parametrize("step", ["calibrate", "search", "freeze", "batch norm", "start", "allocate"])
def test_every_step_refuses_ranks_with_different_models(ranks: Ranks, step: str) -> None:
    for kind, error in ranks.outcomes(different, step):
        assert kind == "error"
        assert isinstance(error, DistributedError)
        assert "found that the numbers in 0.bias differ between rank 0 and rank 1" in str(error)


# ---------------------------------------------------------------------- bits


def frozen(wrapped: bool = False) -> dict[str, Any]:
    model = prepared()
    torch.manual_seed(5)
    with torch.no_grad():
        for quantizer in quantizers(model):
            if not quantizer.is_frozen:
                quantizer.bit_raw.normal_()
    given = nn.parallel.DistributedDataParallel(model) if wrapped else model
    found = nipq.freeze_bits_(given, BUDGET)
    return found.bits if not wrapped else {name.removeprefix("module."): bits for name, bits in found.bits.items()}


def test_bits_are_frozen_alike_and_as_in_one_process(ranks: Ranks) -> None:
    expected = frozen()
    assert ranks(frozen) == [expected, expected]
    assert ranks(frozen, True) == [expected, expected]


def out_of_reach() -> None:
    nipq.freeze_bits_(prepared(), nipq.AverageBits(weights=1.5))


def test_a_budget_out_of_reach_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for kind, error in ranks.outcomes(out_of_reach):
        assert kind == "error"
        assert isinstance(error, BudgetError)


def started(count: int = 0) -> tuple[dict[str, float], dict[str, Tensor]]:
    model = prepared()
    given = own(batches(16))
    losses = nipq.allocate_bits_(model, given[: len(given) - count * rank()], BUDGET, cross_entropy)
    return losses, state(model)


def seeds() -> list[int]:
    return [nipq.distributed.rank_seed(seed) for seed in range(16)]


def test_bits_start_where_the_mean_over_ranks_says(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that gives each half of a batch the noise of its rank comes to the same losses and bits."""
    first, second = ranks(started)
    assert first[0] == second[0]
    same(first[1], second[1])
    slopes, theirs = sensitivity._slopes, ranks(seeds)[1]

    def by_halves(model: nn.Module, quantizers: Any, batch: Any, loss_fn: Any, seed: int, *rest: Any) -> list[float]:
        halves = ((slice(0, 8), seed), (slice(8, 16), theirs[seed]))
        parts = [((batch[0][part], batch[1][part]), own) for part, own in halves]
        found = [slopes(model, quantizers, half, loss_fn, own, *rest) for half, own in parts]
        return [(a + b) / 2 for a, b in zip(*found, strict=True)]

    monkeypatch.setattr(sensitivity, "_slopes", by_halves)
    losses, ended = started()
    assert first[0] == pytest.approx(losses, rel=1e-4)
    close(ended, first[1], 1e-5)


def test_different_numbers_of_batches_are_named(ranks: Ranks) -> None:
    for _, error in ranks.outcomes(started, 3):
        assert isinstance(error, DistributedError)
        assert "allocate_bits_: expected as many batches on every rank, found [16, 13]. Pass batches=13." in str(error)


def allocated() -> dict[str, int]:
    model = prepared()
    return allocate_(model, own(batches(4)), cross_entropy, BUDGET, samples=48, probes=4).bits


def test_allocation_is_that_of_one_process(ranks: Ranks) -> None:
    pytest.importorskip("curvlinops")
    expected = allocated()
    assert ranks(allocated) == [expected, expected]


# ---------------------------------------------------------------------- in a loop


def trained(steps: int) -> dict[str, Any]:
    """A search under DDP with an average of weights, each rank with noise of its own, then a freeze."""
    model = prepared()
    search = Search(model, BUDGET, steps)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model
    optimizer = torch.optim.SGD(nipq.param_groups(wrapped, lr=0.05), momentum=0.9)
    average = WeightAverage(model, 0.9)
    watch = Oscillations(model, steps, freeze=0.05)
    torch.manual_seed(nipq.distributed.rank_seed(3))
    noise = torch.get_rng_state().sum().item()
    given = own(batches(8))
    for step in range(steps):
        loss = loss_of(wrapped, given[step % 8]) + search.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
        watch.step()
        average.update(model)
    learned = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = copy.deepcopy(average.state_dict()["average"])
    prices = search.state_dict()["controller"]
    nipq.freeze_bits_(model, search.budget)
    bits = {quantizer.name: quantizer.bits_rounded for quantizer in quantizers(model)}
    parameters = {name: value for name, value in kept.items() if "running" not in name}
    return {"learned": learned, "average": parameters, "prices": prices, "bits": bits, "noise": noise}


def test_a_search_under_ddp_keeps_ranks_alike_with_noise_of_their_own(ranks: Ranks) -> None:
    first, second = ranks(trained, 12)
    for part in ("learned", "average", "prices"):
        same(first[part], second[part])
    assert first["bits"] == second["bits"]
    assert first["noise"] != second["noise"]
    again = ranks(trained, 12)[1]
    same(again["learned"], second["learned"])
