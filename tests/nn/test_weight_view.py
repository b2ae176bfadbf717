"""Writes to the weight of a prepared layer reach the float weight, or raise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.errors import OrderError
from nipq.prepare.layer_table import quantizers


def prepared() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    return nipq.calibrate_(nipq.prepare_(model, x), [x])  # type: ignore[return-value]


def float_weight(model: nn.Sequential) -> Tensor:
    return model.get_parameter("0.parametrizations.weight.original")


@torch.no_grad()
def copied(layer: nn.Linear) -> None:
    layer.weight.copy_(torch.full((3, 4), 2.0))


@torch.no_grad()
def an_entry(layer: nn.Linear) -> None:
    layer.weight[:] = 2.0


@torch.no_grad()
def multiplied(layer: nn.Linear) -> None:
    layer.weight.zero_()
    layer.weight += 1
    layer.weight *= 2


def data_set(layer: nn.Linear) -> None:
    layer.weight.data = torch.full((3, 4), 2.0)


def data_written(layer: nn.Linear) -> None:
    layer.weight.data.mul_(0)
    layer.weight.data += 2


def initialised(layer: nn.Linear) -> None:
    nn.init.constant_(layer.weight, 2.0)


def assigned(layer: nn.Linear) -> None:
    layer.weight = torch.full((3, 4), 2.0)  # type: ignore[assignment]


def replaced(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.full((3, 4), 2.0))


@pytest.mark.parametrize(
    "write", [replaced, copied, an_entry, multiplied, data_set, data_written, initialised, assigned]
)
def test_a_write_reaches_the_float_weight(write: Callable[[nn.Linear], None]) -> None:
    model = prepared()
    write(model[0])  # type: ignore[arg-type]
    assert torch.equal(float_weight(model), torch.full((3, 4), 2.0))


@torch.no_grad()
@pytest.mark.parametrize(
    "part",
    [
        lambda w: w.view(-1), lambda w: w[0], lambda w: w.detach(), lambda w: w.t(), lambda w: w.chunk(3)[0],
        lambda w: w.unbind()[1], lambda w: next(iter(w)), lambda w: w.T, lambda w: w.view(-1)[:4].data,
        lambda w: w.as_strided((4,), (1,)), lambda w: w.expand(2, 3, 4),
    ],
)  # fmt: skip
def test_a_write_into_a_part_is_refused(part: Callable[[Tensor], Tensor]) -> None:
    model = prepared()
    before = float_weight(model).clone()
    with pytest.raises(OrderError, match=r"0\.weight: expected writes to the weight itself"):
        part(model[0].weight).zero_()
    assert torch.equal(float_weight(model), before)


def test_a_write_past_the_methods_raises_at_the_next_look() -> None:
    model = prepared()
    before = float_weight(model).clone()
    with torch.no_grad():
        weight = model[0].weight
        torch.flatten(weight).zero_()
        del weight
    with pytest.raises(OrderError, match=r"0\.weight: expected writes to the weight itself"):
        model(torch.zeros(1, 4))
    assert torch.equal(float_weight(model), before)
    model(torch.zeros(1, 4))  # once


def test_freezing_a_layer_freezes_its_float_weight() -> None:
    model = prepared()
    model[0].weight.requires_grad_(False)
    assert not float_weight(model).requires_grad


def test_gradients_copies_and_tools_of_torch_are_as_before() -> None:
    model, x = prepared(), torch.randn(5, 4)
    model(x).sum().backward()
    assert float_weight(model).grad is not None
    assert type(model[0].weight + 0) is Tensor
    copied = copy.deepcopy(model)
    copied[0].weight.data.zero_()
    assert float_weight(model).abs().sum() > 0
    assert float_weight(copied).abs().sum() == 0
    model.eval()
    expected = model(x)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)


def test_a_deployed_weight_cannot_be_written() -> None:
    model = prepared()
    nipq.freeze_bits_(model, nipq.AverageBits(weights=4))
    deployed = nipq.convert(model)
    with pytest.raises(OrderError, match="deployed layer"):
        deployed[0].weight.data.mul_(0)
    with pytest.raises(OrderError, match="deployed layer"):
        nn.init.zeros_(deployed[0].weight)


def test_a_parameter_in_place_of_the_weight_keeps_that_of_the_optimizer() -> None:
    model = prepared()
    weight = float_weight(model)
    model[0].weight = nn.Parameter(torch.zeros(3, 4), requires_grad=False)  # type: ignore[assignment]
    assert float_weight(model) is weight
    assert not weight.requires_grad
    nipq.restore_(model)
    assert model[0].weight is weight


def test_the_gradient_and_its_switch_are_those_of_the_float_weight() -> None:
    model = prepared()
    model(torch.randn(5, 4)).sum().backward()
    layer = model[0]
    assert layer.weight.grad is float_weight(model).grad is not None  # type: ignore[union-attr]
    layer.weight.grad = None  # type: ignore[union-attr]
    layer.weight.requires_grad = False  # type: ignore[union-attr]
    assert float_weight(model).grad is None
    assert not float_weight(model).requires_grad


def test_a_deployed_weight_can_be_read() -> None:
    model = prepared()
    nipq.freeze_bits_(model, nipq.AverageBits(weights=4))
    weight = nipq.convert(model)[0].weight  # type: ignore[index]
    assert torch.equal(weight.data, weight + 0)
    assert weight.grad is None


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("read", [lambda weight: weight.numpy(), np.asarray, lambda weight: weight[1:].numpy()])
def test_an_array_of_a_quantized_weight_is_read_only(read: Callable[[Tensor], Any], deployed: bool) -> None:
    model = prepared().eval()
    if deployed:
        for quantizer in quantizers(model):
            quantizer.freeze_bits_(4)
        model = nipq.convert(model)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        found = read(model[0].weight)
    with pytest.raises(ValueError, match="read-only"):
        found[...] = 3.0
    assert torch.equal(torch.from_numpy(found.copy()), before[-len(found) :])


def test_the_data_of_a_quantized_weight_are_written_through_as_an_array_too() -> None:
    model = prepared()
    model[0].weight.data.numpy()[...] = 2.0
    assert torch.equal(float_weight(model), torch.full((3, 4), 2.0))
