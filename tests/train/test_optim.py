"""Optimizers and schedules that a config asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nipq.train import optim
from nipq.train.config import OptimizerConfig, TrainConfig, check_config
from nipq.train.optim import Curve, apply_, load_states_, make_optimizers, schedule_of
from nipq.train.trainer import Trainer

Make = Callable[..., TrainConfig]
Until = Callable[[Trainer, str], Trainer]
SHORT = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 1, "lr": 0.01}}
DATA = {"kind": "digits", "batch_size": 32, "train_limit": 128}
BOTH = ["search", "finetune"]


def config(lr: float | None = 0.01, **optimizer: object) -> TrainConfig:
    return check_config({
        "model": {"factory": "resnet18"},
        "data": {"kind": "digits"},
        "budget": {"model_size": "1 MB"},
        "stages": {"float": {"epochs": 5}, "search": {"epochs": 40}, "finetune": {"epochs": 3, "lr": lr}},
        "optimizer": {"lr": 0.04, "warmup_epochs": 3, "final": 0.001, **optimizer},
    })  # fmt: skip


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("epoch", "lr"), [(0, 5.9e-4), (1, 2.9e-4), (2, 1.0e-4)])
def test_published_rates_of_the_last_epochs(epoch: int, lr: float) -> None:
    settings = config(None, schedule="spanning", step="epoch")
    factor = schedule_of(settings, BOTH, 10)
    assert 0.04 * factor((40 + epoch) * 10 + 9) == pytest.approx(lr, rel=0.03)


def test_warmup_is_linear_and_meets_the_cosine() -> None:
    curve = Curve(epochs=10, warmup=2, warmup_start=0.1, final=0.0)
    assert [curve.factor(t) for t in (0.0, 0.5)] == pytest.approx([0.1, 0.325])
    assert curve.factor(2) == pytest.approx(1.0)
    assert curve.factor(6) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_cosine_ends_at_its_final_factor_and_stays() -> None:
    curve = Curve(epochs=4, final=0.25)
    assert curve.factor(4) == pytest.approx(0.25)
    assert curve.factor(9) == pytest.approx(0.25)


def test_every_stage_starts_at_its_own_peak() -> None:
    factor = schedule_of(config(), BOTH, 10)
    assert factor(0) == pytest.approx(0.1)  # of the warm-up
    assert factor(30) == pytest.approx(1.0)
    assert factor(400) == pytest.approx(0.25)  # 0.01 of 0.04, and no warm-up
    assert schedule_of(config(), ["float"], 10)(0) == pytest.approx(0.1)


def test_spanning_curve_is_continuous_between_stages() -> None:
    factor = schedule_of(config(None, schedule="spanning"), BOTH, 1000)
    assert factor(40_000) == pytest.approx(factor(39_999), rel=0.01)


def test_epochs_change_the_rate_when_it_is_asked_to_change_by_epoch() -> None:
    factor = schedule_of(config(step="epoch"), BOTH, 10)
    assert factor(100) == factor(109) > factor(110)


def test_the_session_follows_the_schedule(make_config: Make, until: Until) -> None:
    settings = make_config(stages=SHORT, data=DATA, optimizer={"lr": 0.05, "bits_lr": 0.2})
    trainer = until(Trainer(settings), "search")
    factor, rates = schedule_of(settings, BOTH, 4), []
    for batch in trainer.batches():
        rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})
        trainer.step(*batch)
        trainer.follow()
    assert trainer.progress.stage == "finetune"
    assert trainer.rate == pytest.approx(0.01)
    for step, found in enumerate(rates):
        expected = {"weights": 0.05, "no_decay": 0.05, "ranges": 0.05, "bits": 0.2}
        assert found == pytest.approx({name: rate * factor(step) for name, rate in expected.items()})


@pytest.mark.parametrize("schedule", ["per_stage", "spanning"])
def test_a_new_curve_starts_without_momentum(schedule: str, make_config: Make, until: Until) -> None:
    trainer = until(Trainer(make_config(stages=SHORT, data=DATA, optimizer={"schedule": schedule})), "finetune")
    assert bool(trainer.optimizers[0].state) == (schedule == "spanning")


# ---------------------------------------------------------------------- groups and states

OPTIMIZER = {"lr": 0.05, "weight_decay": 0.1, "range_decay": 0.3, "range_momentum": 0.0, "bits_momentum": 0.5}


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({}, "momentum", {"weights": 0.9, "no_decay": 0.9, "ranges": 0.0, "bits": 0.5}),
        ({}, "weight_decay", {"weights": 0.1, "no_decay": 0.0, "ranges": 0.3, "bits": 0.0}),
        ({"quantizer_optimizer": "adam"}, "betas", {"ranges": (0.0, 0.999), "bits": (0.5, 0.999)}),
        (
            {"name": "adamw", "bits_momentum": None},
            "betas",
            {"weights": (0.9, 0.999), "no_decay": (0.9, 0.999), "ranges": (0.0, 0.999), "bits": (0.9, 0.999)},
        ),
    ],
)
def test_ranges_and_bits_have_settings_of_their_own(
    changes: dict[str, Any], field: str, values: dict[str, Any], make_config: Make, until: Until
) -> None:
    trainer = until(Trainer(make_config(stages=SHORT, data=DATA, optimizer={**OPTIMIZER, **changes})), "search")
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert {group["name"]: group[field] for group in groups if field in group} == values
    trainer.step(*next(trainer.batches()))  # momentum 0 beside nesterov is fine


def test_range_decay_pulls_ranges_alone(make_config: Make, until: Until) -> None:
    def after_a_step(decay: float) -> dict[str, torch.Tensor]:
        optimizer = {"lr": 0.05, "range_decay": decay}
        trainer = until(Trainer(make_config(stages=SHORT, data=DATA, optimizer=optimizer)), "search")
        trainer.step(*next(trainer.batches()))
        return {name: p.detach() for name, p in trainer.model.named_parameters()}

    plain, decayed = after_a_step(0.0), after_a_step(0.1)
    changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    ranges = {name for name in plain if name.endswith("alpha_raw")}
    assert len(changed) == len(ranges) - 1  # the image's is not learned
    assert changed < ranges


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_of_another_device_goes_on_with_the_kernel_of_this_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a fused step can be told to change nothing; a file from a CPU says nothing about that."""
    layer = nn.Linear(2, 2)

    def built(device: str) -> list[torch.optim.Optimizer]:
        monkeypatch.setattr(optim, "FUSED", (device,))
        found = make_optimizers(layer, OptimizerConfig(name=name), prepared=False)
        layer(torch.ones(1, 2)).sum().backward()
        return found

    plain = built("cuda")
    apply_(plain)
    fused = built("cpu")
    load_states_(fused, [optimizer.state_dict() for optimizer in plain])
    before = layer.weight.detach().clone()
    apply_(fused, torch.ones(()))
    assert torch.equal(layer.weight, before)
    back = built("cuda")
    load_states_(back, [optimizer.state_dict() for optimizer in fused])
    apply_(back)
    assert not torch.equal(layer.weight, before)
