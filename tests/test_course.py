"""The stages in somebody else's loop: optimizers, schedulers, scalers, averages and checkpoints across the freeze."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from nipq.averaging import WeightAverage
from nipq.budget import AverageBits, ModelSize, costs
from nipq.calibrate import calibrate_
from nipq.control import phase_of
from nipq.course import Course
from nipq.errors import BudgetError, ConfigError, OrderError
from nipq.layer_table import quantizers
from nipq.optim import check_optimizer, param_groups, without_bits
from nipq.prepare import prepare_

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3
BUDGET = AverageBits(weights=4, activations=4)
TOTAL, FREEZE = 20, 14


def plain() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 3))


def net() -> nn.Module:
    torch.manual_seed(3)
    return calibrate_(prepare_(plain(), X[:1]), [X])


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 1e-2, 1e-2, bits_lr=5e-2), lr=1e-2, **settings)


class Loop:
    """A loop as people write them: AdamW, a schedule with a number for each group, clipping."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        self.model = (net() if model is None else model).train()
        self.optimizer = adamw(self.model)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rates, total_steps=60)
        given: dict[str, Any] = {"optimizer": self.optimizer, "loader": [X]} | settings
        self.course = Course(self.model, BUDGET, TOTAL, **given)

    def steps(self, count: int) -> Loop:
        for _ in range(count):
            loss = cross_entropy(self.model(X), Y) + self.course.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.course.step()
        return self

    PARTS = ("course", "model", "optimizer", "scheduler")

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        states = {part: getattr(self, part).state_dict() for part in self.PARTS}
        torch.save(states | {"rng": torch.get_rng_state()}, file)
        return file

    def load(self, file: io.BytesIO, order: tuple[str, ...] = PARTS) -> Loop:
        file.seek(0)
        states = torch.load(file, weights_only=True)
        for part in order:
            getattr(self, part).load_state_dict(states[part])
        torch.set_rng_state(states["rng"])
        return self


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def keeps(model: nn.Module) -> bool:
    return all(q.is_frozen for q in quantizers(model)) and all(c.rounded <= c.target for c in costs(model, BUDGET))


# ---------------------------------------------------------------------- the stages


def test_search_freeze_finetune_finish() -> None:
    loop = Loop()
    assert (loop.course.stage, str(phase_of(loop.model)), loop.course.search_steps) == ("search", "noise", FREEZE)
    loop.steps(FREEZE - 1)
    assert loop.course.stage == "search"
    statistics = loop.model[1].running_mean.clone()
    loop.steps(1)
    assert (loop.course.stage, str(phase_of(loop.model))) == ("finetune", "round")
    assert keeps(loop.model)
    assert not torch.equal(loop.model[1].running_mean, statistics)
    assert int(loop.model[1].num_batches_tracked) == 1  # measured anew
    check_optimizer(loop.model, loop.optimizer)
    assert len(loop.optimizer.param_groups) == 4
    assert set(loop.optimizer.state) == set(loop.model.parameters())
    loop.steps(TOTAL - FREEZE + 5)  # a loop may go on
    assert (loop.course.stage, loop.course.steps) == ("finetune", TOTAL + 5)
    before = loop.model[1].running_mean.clone()
    loop.course.finish()
    assert loop.course.stage == "done"
    assert not torch.equal(loop.model[1].running_mean, before)
    after = {name: value.clone() for name, value in loop.model.state_dict().items()}
    loop.course.finish()
    loop.steps(0)
    loop.course.step()
    assert equal(after, loop.model.state_dict())
    assert loop.course.bits == {q.name: q.bits_rounded for q in quantizers(loop.model)}


def test_learned_bits_are_those_that_clipping_leaves_out() -> None:
    loop = Loop()
    left = {id(p) for p in loop.model.parameters()} - {id(p) for p in without_bits(loop.model)}
    assert {id(p) for p in loop.course.learned_bits} == left
    assert loop.steps(FREEZE).course.learned_bits == []


def test_stopping_early_in_the_search_still_gives_a_frozen_model_within_the_budget() -> None:
    loop = Loop().steps(3)
    loop.course.finish()
    assert loop.course.stage == "done"
    assert keeps(loop.model)


def test_after_the_freeze_the_penalty_is_zero_and_still_reaches_the_former_bits() -> None:
    loop = Loop()
    former = [q.bit_raw for q in quantizers(loop.model) if not q.is_frozen]
    loop.steps(FREEZE)
    loss = loop.course.penalty()
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert all(raw.grad is not None and raw.grad.item() == 0 for raw in former[1:])
    loop.course.finish()
    assert loop.course.penalty().item() == 0


def test_no_batch_norm_needs_no_loader_and_may_be_left_alone() -> None:
    model = calibrate_(prepare_(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4)), [torch.randn(8, 4)])
    Course(model, AverageBits(weights=4) & ModelSize("1 kB"), 10).finish()
    loop = Loop(loader=None, batchnorm_batches=0).steps(FREEZE - 1)
    tracked = int(loop.model[1].num_batches_tracked)
    loop.steps(1).course.finish()
    assert int(loop.model[1].num_batches_tracked) == tracked + 1


def test_bits_that_are_fixed_go_through_the_same_stages() -> None:
    model = net()
    for quantizer in quantizers(model):
        quantizer.freeze_bits_(4)
    loop = Loop(model).steps(TOTAL)
    assert loop.course.stage == "finetune"
    assert float(loop.course.penalty()) == 0


def test_logs_are_plain_numbers_in_every_stage() -> None:
    loop = Loop()
    logs = loop.course.logs()
    assert set(logs) == {
        "nipq/step", "nipq/frozen", "nipq/average_weight_bits", "nipq/average_weight_bits_soft",
        "nipq/average_activation_bits", "nipq/average_activation_bits_soft",
    }  # fmt: skip
    assert logs["nipq/average_weight_bits"] == 5
    loop.steps(FREEZE)
    logs = loop.course.logs()
    assert all(type(value) is float for value in logs.values())
    assert (logs["nipq/step"], logs["nipq/frozen"]) == (FREEZE, 1)
    assert 2 <= logs["nipq/average_weight_bits"] <= 4
    assert "nipq/average_weight_bits_soft" not in logs


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("at", [5, FREEZE - 1, FREEZE, FREEZE + 2])
def test_resuming_equals_not_stopping_to_the_bit(at: int) -> None:
    whole = Loop().steps(at)
    file = whole.save()
    whole.steps(TOTAL - at).course.finish()
    again = Loop().load(file)
    assert again.course.steps == at
    again.steps(TOTAL - at).course.finish()
    assert equal(whole.model.state_dict(), again.model.state_dict())
    assert whole.course.logs() == again.course.logs()


@pytest.mark.parametrize(
    "order", [("model", "optimizer", "scheduler", "course"), ("model", "course", "optimizer", "scheduler")]
)
def test_the_course_may_be_loaded_at_any_place(order: tuple[str, ...]) -> None:
    whole = Loop().steps(FREEZE + 2)
    file = whole.save()
    again = Loop().load(file, order).steps(2)
    assert str(phase_of(again.model)) == "round"
    assert equal(whole.steps(2).model.state_dict(), again.model.state_dict())


def test_optimizer_and_course_may_be_built_after_the_model_was_loaded() -> None:
    """So do Lightning and transformers."""
    whole = Loop().steps(FREEZE + 2)
    file = whole.save()
    model = net()
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    again = Loop(model).load(file).steps(2)
    assert equal(whole.steps(2).model.state_dict(), again.model.state_dict())


def test_the_state_is_json() -> None:
    for steps in (3, FREEZE):
        loop = Loop().steps(steps)
        state = loop.course.state_dict()
        assert json.loads(json.dumps(state)) == state
        twin = Loop()
        twin.course.load_state_dict(json.loads(json.dumps(state)))
        assert twin.course.state_dict() == state


def test_states_that_do_not_belong_are_refused() -> None:
    early, late = Loop().steps(1).course.state_dict(), Loop().steps(FREEZE).course.state_dict()
    with pytest.raises(OrderError, match=r"state of a course after its freeze.*found one from its search"):
        Loop().steps(FREEZE).course.load_state_dict(early)
    with pytest.raises(ConfigError, match=r"expected a state with limits .*Build it with the same budget"):
        Loop().course.load_state_dict(late | {"limits": {"average weight bits": 2.0}})
    late["bits"]["9.weight"] = late["bits"].pop("6.weight")
    with pytest.raises(ConfigError, match=r"the same quantized tensors, found a difference: [69]\.weight"):
        Loop().course.load_state_dict(late)
    early["search"]["targets"] = [3.0, 4.0]
    with pytest.raises(ConfigError, match="expected a state with targets"):
        Loop().course.load_state_dict(early)


# ---------------------------------------------------------------------- steps that were not made


def test_gradients_may_accumulate_with_a_call_in_every_micro_batch() -> None:
    loop = Loop()
    for micro in range(2 * FREEZE):
        half = slice(0, 8) if micro % 2 == 0 else slice(8, 16)
        ((cross_entropy(loop.model(X[half]), Y[half]) + loop.course.penalty()) / 2).backward()
        if micro % 2:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.course.step()
        assert loop.course.steps == (micro + 1) // 2
    assert loop.course.stage == "finetune"


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_does_not_count(fused: bool) -> None:
    """Fused optimizers skip inside their kernel: nothing moves, and the step counts."""
    model = net().train()
    optimizer = adamw(model, fused=fused)
    course = Course(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = cross_entropy(model(X), Y)
        loss = loss * (float("inf") if step == 4 else 1) + course.penalty()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        course.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step != 4)
    assert course.steps == (8 if fused else 7)
    assert scaler.get_scale() == 512
    course.finish()
    assert keeps(model)


def test_without_an_optimizer_every_call_counts() -> None:
    course = Course(net(), BUDGET, 4, finetune=0.5, loader=[X])
    course.step()
    assert course.stage == "search"
    course.step()
    assert course.stage == "finetune"


def test_several_optimizers_share_a_step() -> None:
    model = net().train()
    groups = param_groups(model, 0.01)
    both = [torch.optim.SGD(groups[:2], lr=0.01, momentum=0.9), torch.optim.Adam(groups[2:], lr=0.01)]
    course = Course(model, BUDGET, 2, optimizer=both, finetune=0.5, loader=[X])
    (cross_entropy(model(X), Y) + course.penalty()).backward()
    for optimizer in both:
        optimizer.step()
    course.step()
    course.step()
    assert (course.steps, course.stage) == (1, "finetune")
    check_optimizer(model, *both)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_quantizer_parameters_stay_float32(dtype: torch.dtype) -> None:
    model = net().train()
    optimizer = adamw(model)
    course = Course(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])
    for _ in range(TOTAL):
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(model(X), Y) + course.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
    course.finish()
    assert {q.alpha_raw.dtype for q in quantizers(model)} == {torch.float32}
    assert keeps(model)


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"0\.weight: expected boundaries and bits in float32, found torch.bfloat16; .*autocast"
    ):
        Course(net().bfloat16(), BUDGET, TOTAL, loader=[X])


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_torchs_average_is_frozen_along_and_keeps_its_bits(use_buffers: bool, decay: float) -> None:
    """At these decays torch's average of whole numbers makes 2 of 3."""
    loop = Loop()
    average = AveragedModel(loop.model, avg_fn=get_ema_avg_fn(decay), use_buffers=use_buffers)
    loop.course.follow(average)
    for _ in range(TOTAL):
        loop.steps(1)
        average.update_parameters(loop.model)
    assert [q.bits_rounded for q in quantizers(average)] == [q.bits_rounded for q in quantizers(loop.model)]
    assert str(phase_of(average)) == "round"
    names = [name for name, _ in loop.model.named_parameters()]
    assert [name for name, _ in average.module.named_parameters()] == names
    assert torch.isfinite(average(X)).all()
    late = AveragedModel(loop.model)
    loop.course.follow(late)
    assert keeps(late)


def test_a_weight_average_crosses_the_freeze_and_can_become_the_model_before_the_finish() -> None:
    loop = Loop()
    average = WeightAverage(loop.model, 0.9)
    for _ in range(TOTAL):
        loop.steps(1)
        average.update(loop.model)
    average.copy_to_(loop.model)
    loop.course.finish()
    assert keeps(loop.model)
    stopped = Loop().steps(5)
    average = WeightAverage(stopped.model, 0.9)
    average.copy_to_(stopped.model)  # averaged bits, frozen within the budget
    stopped.course.finish()
    assert keeps(stopped.model)


# ---------------------------------------------------------------------- what came too early, or is missing


def test_an_optimizer_that_the_trainer_built_before_prepare_is_refused_by_name() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrate_(prepare_(model, X[:1]), [X])
    with pytest.raises(OrderError, match=r"it lacks .*alpha_raw.*Build it from nipq\.param_groups"):
        Course(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])


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
        Course(wrapped, BUDGET, TOTAL, loader=[X])
    model = net()
    wrapped = DistributedDataParallel(model)
    loop = Loop(wrapped).steps(FREEZE + 2)
    loop.course.finish()
    assert loop.course.model is model
    assert not any(name.startswith("module.") for name in loop.course.bits or {})


SETTINGS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Course(net(), BUDGET, TOTAL), ConfigError, "expected a loader to measure its batch norms with"),
    (lambda: Course(net(), BUDGET, TOTAL, loader=[X], finetune=1.0), ConfigError, "finetune from 0 to below 1"),
    (lambda: Course(net(), BUDGET, 0, loader=[X]), ConfigError, "total_steps of at least 1"),
    (lambda: Course(net(), AverageBits(weights=1.5), TOTAL, loader=[X]), BudgetError, "average weight bits"),
    (lambda: Course(plain(), BUDGET, TOTAL), OrderError, "expected a prepared model"),
]


@pytest.mark.parametrize(("build", "error", "message"), SETTINGS)
def test_settings_that_cannot_work_are_refused(build: partial[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_finished_or_closed_course_lets_go_of_the_optimizer() -> None:
    loop = Loop()
    loop.course.close()
    loop.steps(2)
    assert loop.course.steps == 0
    assert not loop.optimizer._optimizer_step_post_hooks
