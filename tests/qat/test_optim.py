"""Parameter groups, and optimizers that do not fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import nipq
from nipq.config import Config
from nipq.errors import OrderError
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.optim import (
    check_optimizer,
    drop_frozen_,
    drop_frozen_on_load_,
    learn_quantizers_,
    param_groups,
    weight_groups,
    without_bits,
)


def net(prepared: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return prepare_(model, torch.zeros(1, 1, 4, 4)) if prepared else model


def learned(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def test_every_parameter_is_in_one_group_and_only_weights_decay() -> None:
    model = net()
    groups = {group["name"]: group for group in param_groups(model, lr=0.1, weight_decay=0.01)}
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "weights": 2,
        "no_decay": 4,  # two biases, the norm's weight and bias
        "ranges": 3,  # the image's boundary is not learned
        "bits": 3,  # and its bits are fixed
    }
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in learned(model))
    assert [group["weight_decay"] for group in groups.values()] == [0.01, 0, 0, 0]
    assert all(group["lr"] == 0.1 for group in groups.values())


def test_boundaries_and_bits_may_have_rates_of_their_own() -> None:
    rates = {g["name"]: g["lr"] for g in param_groups(net(), lr=0.1, range_lr=0.2, bits_lr=0.3)}
    assert (rates["ranges"], rates["bits"]) == (0.2, 0.3)


def test_groups_lose_parameters_and_bits_that_were_learned_leave_an_empty_one() -> None:
    model = net()
    for quantizer in quantizers(model):
        quantizer.freeze_bits_(4)
    model.get_submodule("4.parametrizations.weight").original.requires_grad_(False)
    assert [(g["name"], len(g["params"])) for g in param_groups(model, lr=0.1)] == [
        ("weights", 1),
        ("no_decay", 4),
        ("ranges", 3),
        ("bits", 0),
    ]


def test_bits_that_are_fixed_from_the_start_have_no_group() -> None:
    model = prepare_(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), Config(weight_bits=4, activation_bits=4))
    assert [group["name"] for group in param_groups(model, lr=0.1)] == ["weights", "no_decay", "ranges"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_any_optimizer_takes_the_groups(kind) -> None:
    model = net()
    check_optimizer(model, kind(param_groups(model, lr=0.1), lr=0.1))


def test_bits_are_left_out_of_clipping() -> None:
    model = net()
    bits = {id(q.bit_raw) for q in quantizers(model) if not q.is_frozen}
    assert {id(p) for p in model.parameters()} - {id(p) for p in without_bits(model)} == bits
    assert len(without_bits(net(prepared=False))) == 6


def test_a_float_model_is_refused_but_its_weights_can_be_grouped() -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        param_groups(net(prepared=False), lr=0.1)
    assert [len(g["params"]) for g in weight_groups(net(prepared=False), 0.1, 0.01)] == [2, 4]


def test_an_optimizer_from_before_prepare_is_refused_by_name() -> None:
    model = net(prepared=False)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare_(model, torch.zeros(1, 1, 4, 4))
    with pytest.raises(OrderError, match=r"it lacks 0\.parametrizations\.weight\.0\.alpha_raw, .*, \.\.\.\. Build it"):
        check_optimizer(model, early)


def test_several_optimizers_may_share_the_work() -> None:
    model = net()
    groups = param_groups(model, lr=0.1)
    check_optimizer(model, torch.optim.SGD(groups[:2], lr=0.1), torch.optim.Adam(groups[2:], lr=0.1))
    with pytest.raises(OrderError, match="it lacks"):
        check_optimizer(model, torch.optim.SGD(groups[:2], lr=0.1))


def test_frozen_bits_leave_the_optimizer_and_other_momentum_stays() -> None:
    model = net()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for quantizer in quantizers(model):
        quantizer.freeze_bits_(4)
    with pytest.raises(OrderError, match=r"found 3 of another one or frozen since \(shapes \(1,\), .*drop_frozen_"):
        check_optimizer(model, optimizer)
    drop_frozen_(optimizer, model)
    check_optimizer(model, optimizer)
    assert [(g["name"], len(g["params"])) for g in optimizer.param_groups] == [
        ("weights", 2),
        ("no_decay", 4),
        ("ranges", 3),
        ("bits", 0),
    ]
    assert set(optimizer.state) == learned(model)


def learn_(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def frozen_and_dropped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for quantizer in quantizers(model):
        quantizer.freeze_bits_(4)
    drop_frozen_(optimizer, model)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda step: 0.9**step] * 4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2, 0.3, 0.4], total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, [0.01] * 4, [0.1] * 4, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=[0.001] * 4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=4), schedulers.CosineAnnealingLR(o, 10)], [4]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("build", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_schedulers_outlive_the_freeze_and_give_what_they_would_have_given(kind: str, build) -> None:
    rates = []
    for freeze in (False, True):
        model = net()
        optimizer = build(param_groups(model, lr=0.1, bits_lr=0.4), lr=0.1)
        scheduler = SCHEDULERS[kind](optimizer)
        for step in range(12):
            if freeze and step == 6:
                frozen_and_dropped(model, optimizer)
            learn_(model, optimizer)
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        rates.append([group["lr"] for group in optimizer.param_groups])
        if freeze:
            assert set(optimizer.state) == learned(model)
    assert rates[0] == rates[1]


def test_an_optimizer_of_the_search_loads_a_state_from_after_the_freeze() -> None:
    model, later = net(), net()
    optimizers = [torch.optim.AdamW(param_groups(m, lr=0.1), lr=0.1) for m in (model, later)]
    frozen_and_dropped(model, optimizers[0])
    learn_(model, optimizers[0])
    drop_frozen_on_load_(optimizers[1], later)
    later.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(optimizers[1].state_dict())  # Accelerate does, before anything is dropped
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    check_optimizer(later, optimizers[1])
    pairs = zip(model.parameters(), later.parameters(), strict=True)
    for ours, theirs in [pair for pair in pairs if pair[0].requires_grad]:
        assert torch.equal(optimizers[0].state[ours]["exp_avg"], optimizers[1].state[theirs]["exp_avg"])


def test_quantizers_that_were_frozen_along_are_refused_and_can_be_learned_again() -> None:
    x = torch.randn(6, 4)
    model = nipq.calibrate_(nipq.prepare_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), x), [x])
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)  # type: ignore[index, union-attr]
    optimizer = torch.optim.SGD(nipq.param_groups(model), lr=0.1)
    with pytest.raises(OrderError, match=r"found \d+ without gradients \(0\.weight\.alpha_raw"):
        nipq.QATSession(model, nipq.AverageBits(weights=4), 4, optimizer=optimizer)
    learn_quantizers_(model)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if name.endswith("bit_raw")} | {"2.bias"}
    wanted |= {f"{name}.parametrizations.weight.0.alpha_raw" for name in "02"} | {"2.quantization.input.alpha_raw"}
    assert found == wanted  # the input of the first layer has 8 bits and a fixed range
    nipq.QATSession(model, nipq.AverageBits(weights=4), 4, optimizer=torch.optim.SGD(nipq.param_groups(model), lr=0.1))
