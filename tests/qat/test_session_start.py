"""A session over a model that nobody calibrated: ranges, first bits, learning rates, averages, oscillations, states."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nipq.budget import allocate
from nipq.budget.budget import AverageBits, ModelSize, costs
from nipq.config import Config, Phase
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import phase_of, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.schedule import cosine
from nipq.qat.session import QATSession, is_calibrated
from tests.qat.session_loop import BUDGET, X, Y, equal, keeps, plain

BATCHES = [(X, Y), (X.flip(0), Y.flip(0))]
TOTAL = 20


def fresh() -> nn.Module:
    torch.manual_seed(3)
    return prepare_(plain(), X[:1])


class Plain:
    """The loop of the README."""

    def __init__(self, model: nn.Module | None = None, budget: Any = BUDGET, **settings: Any) -> None:
        self.model = (fresh() if model is None else model).train()
        self.optimizer = torch.optim.SGD(param_groups(self.model), lr=0.02, momentum=0.9)
        given: dict[str, Any] = {
            "loader": BATCHES,
            "loss_fn": cross_entropy,
            "optimizer": self.optimizer,
            "finetune": 0.3,
        } | settings
        self.session = QATSession(self.model, budget, TOTAL, **given)
        self.losses: list[float] = []

    def steps(self, count: int) -> Plain:
        self.model.train()
        for _ in range(count):
            torch.manual_seed(self.session.steps)
            loss = cross_entropy(self.model(X), Y)
            (loss + self.session.penalty()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.session.step()
            self.losses.append(float(loss.detach()))
        return self


def test_ranges_are_calibrated_and_bits_start_at_the_budget() -> None:
    model = fresh()
    assert not is_calibrated(model)
    session = Plain(model).session
    assert is_calibrated(model)
    assert session.sensitivity is not None
    assert all(charge > 0 for charge in session.sensitivity.values())
    for cost in costs(model, BUDGET):
        assert cost.soft == pytest.approx(cost.target, rel=0.1)


def test_ranges_are_those_of_the_bits_that_were_allocated() -> None:
    model = fresh()
    Plain(model)
    found = [q.alpha.detach().clone() for q in quantizers(model)]
    calibrate_(model, BATCHES)
    assert all(torch.equal(ours, q.alpha) for ours, q in zip(found, quantizers(model), strict=True))


def test_a_calibrated_model_keeps_ranges_and_bits() -> None:
    model = calibrate_(fresh(), [X])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session = Plain(model).session
    assert session.sensitivity is None
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("allocation", ["sensitivity", "uniform", None])
def test_other_allocations(allocation: Any) -> None:
    loop = Plain(allocation=allocation)
    frozen = [q.is_frozen for q in quantizers(loop.model)]
    assert all(frozen) if allocation else not all(frozen)
    assert (loop.session.search is None) == (allocation is not None)
    loop.steps(TOTAL).session.finish()
    assert keeps(loop.model)


def test_bits_by_sensitivity_are_measured_twice_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_at: list[list[float]] = []
    measure = allocate.noise_losses

    def watched(model: nn.Module, learned: Any, *args: Any, **settings: Any) -> dict[str, float]:
        measured_at.append([float(quantizer.bits.detach()) for quantizer in learned])
        return measure(model, learned, *args, **settings)

    monkeypatch.setattr(allocate, "noise_losses", watched)
    loop = Plain(allocation="sensitivity")
    first, second = measured_at
    assert len(set(first)) == 1  # the middle of the range
    assert second == pytest.approx([round(bits) for bits in second], abs=0.01)  # whole ones, which the first chose
    assert set(loop.session.sensitivity or ()) == {
        q.name for q in quantizers(loop.model) if len(q.bit_range.choices) > 1
    }
    before = {q.name: q.bits_rounded for q in quantizers(loop.model)}
    loop.steps(TOTAL).session.finish()
    assert {q.name: q.bits_rounded for q in quantizers(loop.model)} == before
    assert keeps(loop.model)


def test_the_default_schedule_is_a_cosine_over_both_stages() -> None:
    loop, rates = Plain(), []
    for _ in range(TOTAL):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.steps(1)
    assert rates == pytest.approx([0.02 * cosine(TOTAL)(step) for step in range(TOTAL)])
    assert rates[0] == max(rates) == 0.02
    assert rates[-1] < 0.001


def test_learning_rates_are_the_callers_without_a_schedule() -> None:
    loop = Plain(schedule=None).steps(TOTAL)
    assert {group["lr"] for group in loop.optimizer.param_groups if group["name"] in ("weights", "no_decay")} == {0.02}


def test_a_function_is_a_schedule() -> None:
    loop = Plain(schedule=lambda steps: 1 / (1 + steps)).steps(3)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 4)


def test_a_second_scheduler_is_refused() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    with pytest.raises(OrderError, match="without a learning-rate scheduler"):
        QATSession(model, BUDGET, TOTAL, loader=BATCHES, optimizer=optimizer)


LATER: list[Any] = [
    partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda _: 0.9),
    partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
]


@pytest.mark.parametrize("kind", LATER)
def test_a_scheduler_that_comes_after_the_session_is_refused_at_its_first_step(kind: Any) -> None:
    loop, free = Plain(), Plain(schedule=None)
    scheduler = kind(loop.optimizer)
    (cross_entropy(loop.model(X), Y) + loop.session.penalty()).backward()
    loop.optimizer.step()
    scheduler.step()
    with pytest.raises(OrderError, match=r"that its schedule set, 0\.02, found 0\.018\. Pass schedule=None"):
        loop.session.step()
    kind(free.optimizer)
    assert free.steps(2).session.steps == 2


def test_a_refused_scheduler_leaves_the_model_alone() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    with pytest.raises(OrderError, match="without a learning-rate scheduler"):
        QATSession(model, BUDGET, TOTAL, loader=BATCHES, optimizer=optimizer)
    assert not is_calibrated(model)


def test_the_length_of_the_run_that_is_continued_holds_for_the_schedule_too() -> None:
    first = Plain().steps(3)
    again = Plain()
    again.model.load_state_dict(first.model.state_dict())
    again.session = QATSession(
        again.model, BUDGET, 5 * TOTAL, loader=BATCHES, finetune=0.3, schedule="cosine",
        optimizer=torch.optim.SGD(param_groups(again.model), lr=0.02, momentum=0.9),
    )  # fmt: skip
    again.optimizer = again.session._optimizers[0]
    again.session.load_state_dict(first.session.state_dict())
    for loop in (first, again):
        loop.steps(4)
    assert again.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]


def test_a_search_in_evaluation_mode_is_refused() -> None:
    loop = Plain()
    loop.model.eval()
    (cross_entropy(loop.model(X), Y) + loop.session.penalty()).backward()
    loop.optimizer.step()
    with pytest.raises(OrderError, match=r"expected training mode when .* found evaluation mode.*model\.train"):
        loop.session.step()
    loop = Plain()
    loop.model.train()[1].eval()  # a batch norm may keep its statistics
    (cross_entropy(loop.model(X), Y) + loop.session.penalty()).backward()
    loop.optimizer.step()
    loop.model.eval()  # and the model may be evaluated before the session's step
    loop.session.step()
    assert loop.session.steps == 1


def test_fine_tuning_alone_may_load_its_checkpoint_after_the_session_was_built() -> None:
    first, again = Plain(finetune=1.0).steps(5), Plain(finetune=1.0, calibration_batches=0)
    again.model.load_state_dict(first.model.state_dict())
    again.session.load_state_dict(first.session.state_dict())
    assert again.session.state_dict() == first.session.state_dict()
    for loop in (first, again):
        loop.optimizer.state.clear()
        loop.steps(2)
    assert equal(again.model.state_dict(), first.model.state_dict())


def test_a_state_of_a_finished_session_finishes_this_one() -> None:
    first = Plain(finetune_phase="noise").steps(TOTAL)
    first.session.finish()
    model = prepare_(plain(), X[:1])
    model.load_state_dict(first.model.state_dict())
    again = Plain(model, finetune_phase="noise")
    again.session.load_state_dict(first.session.state_dict())
    assert (again.session.stage, phase_of(model), model.training) == ("done", Phase.ROUND, False)
    assert not again.optimizer._optimizer_step_post_hooks
    assert torch.equal(model(X), first.model(X))


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.5}], ids=str)
def test_fine_tuning_alone_goes_on_with_the_batch_norms_that_it_had(settings: dict[str, Any]) -> None:
    first = Plain(finetune=1.0, **settings).steps(5)
    model = prepare_(plain(), X[:1])
    model.load_state_dict(first.model.state_dict())
    again = Plain(model, finetune=1.0, **settings)
    again.session.load_state_dict(first.session.state_dict())
    assert equal(again.model.state_dict(), first.model.state_dict())
    with pytest.raises(OrderError, match="state of a session after its freeze"):
        again.session.load_state_dict(Plain(**settings).session.state_dict())


def test_a_ratio_of_rates_is_applied_once() -> None:
    model = fresh()
    groups = param_groups(model)
    scale = {group["name"]: group.get("lr_scale") for group in groups}
    assert scale["weights"] is None
    assert scale["bits"] is not None
    for group in groups:
        if group["name"] == "bits":
            group["lr_scale"] = 7.0
    optimizer = torch.optim.SGD(groups, lr=0.02)
    QATSession(model, BUDGET, TOTAL, loader=BATCHES, optimizer=optimizer, schedule=None)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["bits"] == pytest.approx(0.14)
    assert not any("lr_scale" in group for group in optimizer.param_groups)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"ema_decay": 0.8},
    {"oscillation": {"dampen": 1e-3, "freeze": 0.02}},
    {"noise_mix": "cosine"},
    {"finetune_phase": "noise"},
    {"allocation": "uniform"},
    {"allocation": "sensitivity"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("at", [5, 14, 17])
def test_resuming_equals_not_stopping_to_the_bit(settings: dict[str, Any], at: int) -> None:
    whole = Plain(**settings).steps(TOTAL)
    whole.session.finish()
    first, file = Plain(**settings).steps(at), io.BytesIO()
    parts = {"model": first.model, "optimizer": first.optimizer, "session": first.session}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    model = prepare_(plain(), X[:1])
    model.load_state_dict(saved["model"])
    again = Plain(model, **settings)
    again.optimizer.load_state_dict(saved["optimizer"])
    again.session.load_state_dict(saved["session"])
    again.steps(TOTAL - at).session.finish()
    assert again.losses == whole.losses[at:]
    assert again.session.bits == whole.session.bits
    assert equal(again.model.state_dict(), whole.model.state_dict())


def test_a_state_of_other_settings_is_refused() -> None:
    state = Plain(ema_decay=0.9).session.state_dict()
    with pytest.raises(ConfigError, match="expected a state without ema"):
        Plain().session.load_state_dict(state)


def test_states_are_told_in_order_when_the_model_is_in_them() -> None:
    seen: list[tuple[str, str, bool]] = []
    model = fresh()

    def tell(name: str) -> None:
        seen.append((name, str(phase_of(model)), all(q.is_frozen for q in quantizers(model))))

    loop = Plain(model, on_state=tell).steps(TOTAL)
    loop.session.finish()
    assert [name for name, _, _ in seen] == ["calibrated", "frozen", "bn", "finetuned"]
    assert [frozen for _, _, frozen in seen] == [False, True, True, True]
    assert {phase for _, phase, _ in seen[1:]} == {"round"}


@pytest.mark.parametrize(("finetune", "stage"), [(0.0, "search"), (1.0, "finetune")])
def test_either_stage_may_be_left_out(finetune: float, stage: str) -> None:
    loop = Plain(finetune=finetune)
    assert loop.session.stage == stage
    loop.steps(TOTAL).session.finish()
    assert keeps(loop.model)


def test_no_steps_at_all_leave_a_calibrated_model_within_the_budget() -> None:
    model = fresh()
    session = QATSession(model, BUDGET, 0, loader=BATCHES)
    session.finish()
    assert session.stage == "done"
    assert keeps(model)
    assert not model.training


def test_without_a_budget_bits_stay_where_the_config_fixed_them() -> None:
    torch.manual_seed(3)
    loop = Plain(prepare_(plain(), X[:1], Config(weight_bits=3, activation_bits=5)), budget=None).steps(TOTAL)
    loop.session.finish()
    assert {q.bits_rounded for q in quantizers(loop.model)} == {3, 5, 8}


def test_the_average_is_the_model_in_the_end_and_for_evaluation() -> None:
    loop = Plain(ema_decay=0.5).steps(3)
    own = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    with loop.session.averaged() as model:
        assert not equal(model.state_dict(), own)
    assert equal(loop.model.state_dict(), own)


def test_a_batch_norm_that_was_measured_at_the_freeze_is_measured_again_after_fine_tuning() -> None:
    loop = Plain().steps(TOTAL)
    norm = next(m for m in loop.model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    loop.session.finish()
    assert not torch.equal(norm.running_mean, before)


def test_budgets_of_size_work_too() -> None:
    budget = ModelSize("10 kB") & AverageBits(weights=3)
    loop = Plain(budget=budget).steps(TOTAL)
    loop.session.finish()
    assert all(cost.rounded <= cost.target for cost in costs(loop.model, budget))
