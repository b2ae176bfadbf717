"""Settings of a session: all of them are checked before anything is measured, and each is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nipq.budget.budget import AverageBits
from nipq.errors import ConfigError, NipqError, NonFiniteError, OrderError
from nipq.prepare.layer_table import check_finite, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.optim import param_groups
from nipq.qat.session import CHECK_EVERY, QATSession, is_calibrated
from tests.qat.session_loop import BUDGET, X, plain

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"total_steps": 2.5}, "total_steps to be a whole number of 0 or more, found 2.5"),
    ({"total_steps": True}, "total_steps to be a whole number of 0 or more, found True"),
    ({"budget": 4}, r"expected a budget, found 4\. Give one such as nipq\.AverageBits"),
    ({"optimizer": "sgd"}, "expected an optimizer of torch, or a list of them, found str"),
    ({"finetune": float("nan")}, "finetune from 0 to 1"),
    ({"ramp": 2}, "ramp from 0 to 1"),
    ({"penalty": "paper "}, "penalty 'controller' or 'paper', found 'paper '"),
    ({"allocation": "hessian"}, "allocation 'noise' or 'sensitivity' or 'hawq' or 'uniform' or None, found 'hessian'"),
    ({"allocation_batches": 0}, "allocation_batches to be a whole number of 1 or more, found 0"),
    ({"ema_decay": 1.0}, r"QATSession\(ema_decay=\): expected a decay from 0 to below 1, found 1\.0"),
    ({"ema_decay": "0.9"}, r"ema_decay=\): expected a decay from 0 to below 1, found '0\.9'"),
    ({"oscillation": True}, "expected oscillation as a dict of dampen, freeze, momentum, found bool"),
    ({"oscillation": {"damp": 1}}, "known names in oscillation, found 'damp'; did you mean 'dampen'"),
    ({"oscillation": {"dampen": -1}}, "expected dampen >= 0, found -1"),
    ({"oscillation": {"freeze": 0.5}}, "expected freeze above 0 and at most 0.1, found 0.5"),
    ({"oscillation": {"freeze": "much"}}, "expected a number for oscillation's freeze, found 'much'"),
    ({"oscillation": {}, "total_steps": 0}, "expected at least one step, found total_steps=0"),
    ({"seed": 0.5}, "seed to be a whole number, found 0.5"),
    ({"loss_fn": "mse"}, "expected loss_fn to be a function, found str"),
    ({"on_state": 3}, "expected on_state to be a function, found int"),
    ({"inputs": 0}, "expected inputs to be a function, found int"),
    ({"schedule": "linear"}, "found 'linear'"),
    ({"loader": None}, "expected a loader to calibrate the model"),
    ({"loader": iter([X])}, "expected a loader that can be read several times"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[text[-40:] for _, text in WRONG])
def test_a_wrong_setting_is_named_before_anything_is_measured(settings: dict[str, Any], message: str) -> None:
    model = prepare_(plain(), X[:1])
    given = {"budget": BUDGET, "total_steps": 10, "loader": [X]} | settings
    with pytest.raises(ConfigError, match=message):
        QATSession(model, **given)
    assert not any(quantizer.calibrated for quantizer in quantizers(model) if "input" in quantizer.name)


def session(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, QATSession]:
    torch.manual_seed(3)
    model = prepare_(plain(), X[:1])
    optimizer = torch.optim.SGD(param_groups(model), lr=0.01)
    given = {"loader": [X], "optimizer": optimizer, "schedule": None, "total_steps": 4} | settings
    return model.train(), optimizer, QATSession(model, BUDGET, **given)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, run: QATSession, count: int, factor: float = 1.0) -> None:
    model.train()
    for _ in range(count):
        (factor * model(X).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


def test_weight_decay_on_clipping_ranges_is_refused_unless_it_was_asked_for() -> None:
    model = prepare_(plain(), X[:1])
    by_name = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if not n.endswith("bias")], "weight_decay": 0.01},
    ]
    with pytest.raises(ConfigError, match=r"no weight decay on clipping ranges.*0\.weight\.alpha_raw.*param_groups"):
        QATSession(model, BUDGET, 4, loader=[X], optimizer=torch.optim.SGD(by_name, lr=0.1))
    assert not is_calibrated(model)
    groups = param_groups(model, weight_decay=0.01, range_decay=0.1)  # PACT's penalty
    QATSession(model, BUDGET, 4, loader=[X], optimizer=torch.optim.SGD(groups, lr=0.1))


def test_an_optimizer_from_before_preparing_is_refused() -> None:
    model = plain()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare_(model, X[:1])
    with pytest.raises(
        OrderError, match=r"with every parameter.*it lacks .*alpha_raw.*param_groups.*after nipq.prepare_"
    ):
        QATSession(model, BUDGET, 4, loader=[X], optimizer=early)
    with pytest.raises(OrderError, match="expected a prepared model"):
        param_groups(plain())


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_loss_of_nan_does_not_come_past_the_end(at: int) -> None:
    model, optimizer, run = session(finetune=0.5)
    steps(model, optimizer, run, at)
    with pytest.raises(NonFiniteError, match=r"expected (a )?finite"):  # noqa: PT012 - in the search at once
        steps(model, optimizer, run, 1, float("nan"))
        run.finish()
    assert run.stage != "done"


def test_spoilt_weights_are_noticed_while_training_goes_on() -> None:
    model, optimizer, run = session(total_steps=3 * CHECK_EVERY, finetune=1.0)
    steps(model, optimizer, run, CHECK_EVERY - 1)
    with pytest.raises(NonFiniteError, match=rf"^QATSession, step {CHECK_EVERY}: 0\.\w+: expected finite numbers"):
        steps(model, optimizer, run, 1, float("nan"))


def test_finite_numbers_are_looked_for_in_batch_norms_too() -> None:
    model = plain()
    check_finite(model)
    model[1].running_var[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^1\.running_var: expected finite numbers"):
        check_finite(model)


def test_steps_past_the_end_train_on_and_finishing_twice_does_nothing_more() -> None:
    model, optimizer, run = session()
    steps(model, optimizer, run, 7)
    assert (run.stage, run.steps) == ("finetune", 7)
    run.finish()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    run.finish()
    run.step()
    assert (run.stage, run.steps) == ("done", 7)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_second_session_trains_on_at_the_bits_of_the_first() -> None:
    model, optimizer, run = session()
    steps(model, optimizer, run, 4)
    run.finish()
    again = QATSession(model, BUDGET, 4, loader=[X], optimizer=optimizer, schedule=None)
    steps(model, optimizer, again, 4)
    again.finish()
    assert again.bits == run.bits
    assert again.search is None


def test_a_second_session_with_another_budget_is_refused_before_it_trains() -> None:
    model, optimizer, run = session()
    steps(model, optimizer, run, 4)
    run.finish()
    for budget, error in ((AverageBits(weights=6, activations=6), OrderError), (AverageBits(weights=2.1), NipqError)):
        with pytest.raises(error, match=r"frozen within average weight bits 4|average weight bits within"):
            QATSession(model, budget, 4, loader=[X], optimizer=optimizer)
