"""The learning rate over a run, against the published recipe's values and closed forms."""

from __future__ import annotations

import math

import pytest
from nipq.train.schedule import Schedule, schedule_of

from nipq.train.config import TrainConfig, check_config


def config(**optimizer: object) -> TrainConfig:
    return check_config({
        "model": {"factory": "resnet18"},
        "data": {"kind": "digits"},
        "budget": {"model_size": "1 MB"},
        "stages": {"float": {"epochs": 5}, "search": {"epochs": 40}, "finetune": {"epochs": 3}},
        "optimizer": {"warmup_epochs": 3, "final": 0.001, **optimizer},
    })  # fmt: skip


@pytest.mark.parametrize(("epoch", "lr"), [(0, 5.9e-4), (1, 2.9e-4), (2, 1.0e-4)])
def test_published_rates_of_the_last_epochs(epoch: int, lr: float) -> None:
    schedule = schedule_of(config(schedule="spanning", step="epoch"), "finetune")
    assert 0.04 * schedule.factor(epoch, 0.9) == pytest.approx(lr, rel=0.03)


def test_warmup_is_linear_and_meets_the_cosine() -> None:
    schedule = Schedule(epochs=10, warmup=2, warmup_start=0.1, final=0.0)
    assert [schedule.factor(0, t) for t in (0.0, 0.5)] == pytest.approx([0.1, 0.325])
    assert schedule.factor(2, 0.0) == pytest.approx(1.0)
    assert schedule.factor(6, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_cosine_ends_at_its_final_factor_and_stays() -> None:
    schedule = Schedule(epochs=4, final=0.25)
    assert schedule.factor(4) == pytest.approx(0.25)
    assert schedule.factor(9) == pytest.approx(0.25)


def test_stages_of_their_own_start_at_the_peak() -> None:
    settings = config()
    assert schedule_of(settings, "finetune").factor(0) == pytest.approx(1.0)
    assert schedule_of(settings, "search").factor(0) == pytest.approx(0.1)


def test_spanning_curve_is_continuous_between_stages() -> None:
    settings = config(schedule="spanning")
    end = schedule_of(settings, "search").factor(39, 1.0)
    assert schedule_of(settings, "finetune").factor(0) == pytest.approx(end)
