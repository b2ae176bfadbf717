"""The stages in somebody else's loop, and what is refused before the first one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from nipq.budget.budget import AverageBits, ModelSize
from nipq.errors import BudgetError, ConfigError, DistributedError, OrderError
from nipq.prepare.layer_table import phase_of, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import check_optimizer, without_bits
from nipq.qat.search import Search
from nipq.qat.session import QATSession
from tests.qat.session_loop import BUDGET, FREEZE, TOTAL, Loop, X, equal, keeps, net, plain

# ---------------------------------------------------------------------- the stages


def test_search_freeze_finetune_finish() -> None:
    loop = Loop()
    assert (loop.session.stage, str(phase_of(loop.model)), loop.session.search_steps) == ("search", "noise", FREEZE)
    loop.steps(FREEZE - 1)
    assert loop.session.stage == "search"
    statistics = loop.model[1].running_mean.clone()
    loop.steps(1)
    assert (loop.session.stage, str(phase_of(loop.model))) == ("finetune", "round")
    assert keeps(loop.model)
    assert not torch.equal(loop.model[1].running_mean, statistics)
    assert int(loop.model[1].num_batches_tracked) == 1  # measured anew
    check_optimizer(loop.model, loop.optimizer)
    assert len(loop.optimizer.param_groups) == 4
    assert set(loop.optimizer.state) == {p for p in loop.model.parameters() if p.requires_grad}
    loop.steps(TOTAL - FREEZE + 5)  # a loop may go on
    assert (loop.session.stage, loop.session.steps) == ("finetune", TOTAL + 5)
    before = loop.model[1].running_mean.clone()
    loop.session.finish()
    assert loop.session.stage == "done"
    assert not torch.equal(loop.model[1].running_mean, before)
    after = {name: value.clone() for name, value in loop.model.state_dict().items()}
    loop.session.finish()
    loop.steps(0)
    loop.session.step()
    assert equal(after, loop.model.state_dict())
    assert loop.session.bits == {q.name: q.bits_rounded for q in quantizers(loop.model)}


def test_learned_bits_are_those_that_clipping_leaves_out() -> None:
    loop = Loop()
    left = {id(p) for p in loop.model.parameters()} - {id(p) for p in without_bits(loop.model)}
    assert {id(p) for p in loop.session.learned_bits} == left
    assert loop.steps(FREEZE).session.learned_bits == []


def test_stopping_early_in_the_search_still_gives_a_frozen_model_within_the_budget() -> None:
    loop = Loop().steps(3)
    loop.session.finish()
    assert loop.session.stage == "done"
    assert keeps(loop.model)


def test_after_the_freeze_the_penalty_is_zero_and_still_reaches_the_former_bits() -> None:
    loop = Loop()
    former = [q.bit_raw for q in quantizers(loop.model) if not q.is_frozen]
    loop.steps(FREEZE)
    loss = loop.session.penalty()
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert all(raw.grad is not None and raw.grad.item() == 0 for raw in former[1:])
    loop.session.finish()
    assert loop.session.penalty().item() == 0


def test_no_batch_norm_needs_no_loader_and_may_be_left_alone() -> None:
    model = calibrate_(prepare_(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4)), [torch.randn(8, 4)])
    QATSession(model, AverageBits(weights=4) & ModelSize("1 kB"), 10).finish()
    loop = Loop(loader=None, batchnorm_batches=0).steps(FREEZE - 1)
    tracked = int(loop.model[1].num_batches_tracked)
    loop.steps(1).session.finish()
    assert int(loop.model[1].num_batches_tracked) == tracked + 1


def test_bits_that_are_fixed_go_through_the_same_stages() -> None:
    model = net()
    for quantizer in quantizers(model):
        quantizer.freeze_bits_(4)
    loop = Loop(model).steps(TOTAL)
    assert loop.session.stage == "finetune"
    assert float(loop.session.penalty()) == 0


def test_logs_are_plain_numbers_in_every_stage() -> None:
    loop = Loop()
    logs = loop.session.logs()
    assert set(logs) == {
        "nipq/step", "nipq/frozen", "nipq/average_weight_bits", "nipq/average_weight_bits_soft",
        "nipq/average_activation_bits", "nipq/average_activation_bits_soft",
    }  # fmt: skip
    assert logs["nipq/average_weight_bits"] == 5
    loop.steps(FREEZE)
    logs = loop.session.logs()
    assert all(type(value) is float for value in logs.values())
    assert (logs["nipq/step"], logs["nipq/frozen"]) == (FREEZE, 1)
    assert 2 <= logs["nipq/average_weight_bits"] <= 4
    assert "nipq/average_weight_bits_soft" not in logs


# ---------------------------------------------------------------------- what came too early, or is missing


def test_an_optimizer_that_the_trainer_built_before_prepare_is_refused_by_name() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrate_(prepare_(model, X[:1]), [X])
    with pytest.raises(OrderError, match=r"it lacks .*alpha_raw.*Build it from nipq\.param_groups"):
        QATSession(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_around_a_float_model_is_refused_and_around_a_prepared_one_is_looked_through(group: None) -> None:
    early = plain()
    wrapped = DistributedDataParallel(early)
    calibrate_(prepare_(early, X[:1]), [X])
    with pytest.raises(
        OrderError, match=r"Sequential: expected DistributedDataParallel around a prepared model.*alpha_raw"
    ):
        QATSession(wrapped, BUDGET, TOTAL, loader=[X])
    with pytest.raises(OrderError, match=r"Sequential: expected DistributedDataParallel around a prepared model"):
        Search(wrapped, BUDGET, TOTAL)
    model = net()
    wrapped = DistributedDataParallel(model)
    loop = Loop(wrapped).steps(FREEZE + 2)
    loop.session.finish()
    assert loop.session.model is model
    assert not any(name.startswith("module.") for name in loop.session.bits or {})


def test_the_first_generation_of_fsdp_is_refused_by_name(group: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about a CPU
        wrapped = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(DistributedError, match=r"expected FSDP2 \(fully_shard\), found FullyShardedDataParallel"):
        QATSession(wrapped, BUDGET, TOTAL, loader=[X])


SETTINGS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: QATSession(net(), BUDGET, TOTAL),
        ConfigError,
        "a loader to calibrate the model",
    ),
    (lambda: QATSession(net(), BUDGET, TOTAL, loader=[X], finetune=1.5), ConfigError, "finetune from 0 to 1"),
    (lambda: QATSession(net(), BUDGET, -1, loader=[X]), ConfigError, "total_steps to be a whole number of 0 or more"),
    (lambda: QATSession(net(), BUDGET, TOTAL, loader=iter([X])), ConfigError, "read several times"),
    (lambda: Loop(finetune_phase="int"), ConfigError, "finetune_phase 'round' or 'noise', found 'int'"),
    (lambda: Loop(noise_mix="Linear"), ConfigError, "noise_mix 'none' or 'linear' or 'cosine', found 'Linear'"),
    (lambda: Loop(batchnorm_batches=-1), ConfigError, "batchnorm_batches to be a whole number of 0 or more, found -1"),
    (lambda: Loop(calibration_batches=-1), ConfigError, "calibration_batches to be a whole number of 0"),
    (lambda: QATSession(net(), BUDGET, TOTAL, loader=[X], schedule="step"), ConfigError, "found 'step'"),
    (lambda: QATSession(net(), AverageBits(weights=1.5), TOTAL, loader=[X]), BudgetError, "average weight bits"),
    (lambda: QATSession(plain(), BUDGET, TOTAL), OrderError, "expected a prepared model"),
]


@pytest.mark.parametrize(("build", "error", "message"), SETTINGS)
def test_settings_that_cannot_work_are_refused(build: partial[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_finished_or_closed_session_lets_go_of_the_optimizer() -> None:
    loop = Loop()
    loop.session.close()
    loop.steps(2)
    assert loop.session.steps == 0
    assert not loop.optimizer._optimizer_step_post_hooks
