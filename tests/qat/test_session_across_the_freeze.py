"""What a session goes through unharmed: checkpoints, steps that were not made, low precision, averages of weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import phase_of, quantizers
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import check_optimizer, param_groups
from nipq.qat.session import QATSession
from tests.qat.session_loop import BUDGET, FREEZE, TOTAL, Loop, X, Y, adamw, equal, keeps, net

# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("at", [5, FREEZE - 1, FREEZE, FREEZE + 2])
def test_resuming_equals_not_stopping_to_the_bit(at: int) -> None:
    whole = Loop().steps(at)
    file = whole.save()
    whole.steps(TOTAL - at).session.finish()
    again = Loop().load(file)
    assert again.session.steps == at
    again.steps(TOTAL - at).session.finish()
    assert equal(whole.model.state_dict(), again.model.state_dict())
    assert whole.session.logs() == again.session.logs()


@pytest.mark.parametrize(
    "order", [("model", "optimizer", "scheduler", "session"), ("model", "session", "optimizer", "scheduler")]
)
def test_the_session_may_be_loaded_at_any_place(order: tuple[str, ...]) -> None:
    whole = Loop().steps(FREEZE + 2)
    file = whole.save()
    again = Loop().load(file, order).steps(2)
    assert str(phase_of(again.model)) == "round"
    assert equal(whole.steps(2).model.state_dict(), again.model.state_dict())


def test_optimizer_and_session_may_be_built_after_the_model_was_loaded() -> None:
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
        state = loop.session.state_dict()
        assert json.loads(json.dumps(state)) == state
        twin = Loop()
        twin.session.load_state_dict(json.loads(json.dumps(state)))
        assert twin.session.state_dict() == state


def test_states_that_do_not_belong_are_refused() -> None:
    early, late = Loop().steps(1).session.state_dict(), Loop().steps(FREEZE).session.state_dict()
    with pytest.raises(OrderError, match=r"state of a session after its freeze.*found one from its search"):
        Loop().steps(FREEZE).session.load_state_dict(early)
    with pytest.raises(ConfigError, match=r"expected a state with limits .*Build it with the same budget"):
        Loop().session.load_state_dict(late | {"limits": {"average weight bits": 2.0}})
    late["bits"]["9.weight"] = late["bits"].pop("6.weight")
    with pytest.raises(ConfigError, match=r"the same quantized tensors, found a difference: [69]\.weight"):
        Loop().session.load_state_dict(late)
    early["search"]["targets"] = [3.0, 4.0]
    with pytest.raises(ConfigError, match="expected a state with targets"):
        Loop().session.load_state_dict(early)


# ---------------------------------------------------------------------- steps that were not made


def test_gradients_may_accumulate_with_a_call_in_every_micro_batch() -> None:
    loop = Loop()
    for micro in range(2 * FREEZE):
        half = slice(0, 8) if micro % 2 == 0 else slice(8, 16)
        ((cross_entropy(loop.model(X[half]), Y[half]) + loop.session.penalty()) / 2).backward()
        if micro % 2:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.session.step()
        assert loop.session.steps == (micro + 1) // 2
    assert loop.session.stage == "finetune"


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_does_not_count(fused: bool) -> None:
    """Fused optimizers skip inside their kernel: nothing moves, and the step counts."""
    model = net().train()
    optimizer = adamw(model, fused=fused)
    session = QATSession(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = cross_entropy(model(X), Y)
        loss = loss * (float("inf") if step == 4 else 1) + session.penalty()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        session.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step != 4)
    assert session.steps == (8 if fused else 7)
    assert scaler.get_scale() == 512
    session.finish()
    assert keeps(model)


def test_without_an_optimizer_every_call_counts() -> None:
    session = QATSession(net(), BUDGET, 4, finetune=0.5, loader=[X])
    session.step()
    assert session.stage == "search"
    session.step()
    assert session.stage == "finetune"


def test_several_optimizers_share_a_step() -> None:
    model = net().train()
    groups = param_groups(model, 0.01)
    both = [torch.optim.SGD(groups[:2], lr=0.01, momentum=0.9), torch.optim.Adam(groups[2:], lr=0.01)]
    session = QATSession(model, BUDGET, 2, optimizer=both, finetune=0.5, loader=[X])
    (cross_entropy(model(X), Y) + session.penalty()).backward()
    for optimizer in both:
        optimizer.step()
    session.step()
    session.step()
    assert (session.steps, session.stage) == (1, "finetune")
    check_optimizer(model, *both)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_quantizer_parameters_stay_float32(dtype: torch.dtype) -> None:
    model = net().train()
    optimizer = adamw(model)
    session = QATSession(model, BUDGET, TOTAL, optimizer=optimizer, loader=[X])
    for _ in range(TOTAL):
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(model(X), Y) + session.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
    session.finish()
    assert {q.alpha_raw.dtype for q in quantizers(model)} == {torch.float32}
    assert keeps(model)


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"0\.weight: expected clipping ranges and bit-widths in float32, found torch.bf.* autocast",
    ):
        QATSession(net().bfloat16(), BUDGET, TOTAL, loader=[X])


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_torchs_average_is_frozen_along_and_keeps_its_bits(use_buffers: bool, decay: float) -> None:
    """At these decays torch's average of whole numbers makes 2 of 3."""
    loop = Loop()
    average = AveragedModel(loop.model, avg_fn=get_ema_avg_fn(decay), use_buffers=use_buffers)
    loop.session.follow(average)
    for _ in range(TOTAL):
        loop.steps(1)
        average.update_parameters(loop.model)
    assert [q.bits_rounded for q in quantizers(average)] == [q.bits_rounded for q in quantizers(loop.model)]
    assert str(phase_of(average)) == "round"
    names = [name for name, _ in loop.model.named_parameters()]
    assert [name for name, _ in average.module.named_parameters()] == names
    assert torch.isfinite(average(X)).all()
    late = AveragedModel(loop.model)
    loop.session.follow(late)
    assert keeps(late)


def test_a_weight_average_crosses_the_freeze_and_can_become_the_model_before_the_finish() -> None:
    loop = Loop()
    average = WeightAverage(loop.model, 0.9)
    for _ in range(TOTAL):
        loop.steps(1)
        average.update(loop.model)
    average.copy_to_(loop.model)
    loop.session.finish()
    assert keeps(loop.model)
    stopped = Loop().steps(5)
    average = WeightAverage(stopped.model, 0.9)
    average.copy_to_(stopped.model)  # averaged bits, frozen within the budget
    stopped.session.finish()
    assert keeps(stopped.model)
