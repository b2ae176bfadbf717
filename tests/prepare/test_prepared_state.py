"""A prepared model is saved, copied and moved like any other, and tied weights stay tied."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.config import Config, Rule
from nipq.errors import ConfigError, OrderError
from nipq.nn.layers import is_prepared
from nipq.prepare.layer_table import layer_table, quantizers, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_, restore_
from nipq.qat.calibrate import calibrate_

Build = Callable[[], nn.Module]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8)


@pytest.fixture
def model(small_net: Build, x: Tensor) -> nn.Module:
    return calibrate_(prepare_(small_net(), x), [x])


# ---------------------------------------------------------------------- saving and copying


def test_state_dict_round_trip_without_pickle(small_net: Build, model: nn.Module, x: Tensor) -> None:
    set_bits_(model, {"s*": {"weights": 3}})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    copied = prepare_(small_net(), x)
    copied.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(copied(x), model(x))  # frozen ones and learned ones, calibrated, with their grids
    assert [q.is_frozen for q in quantizers(copied)] == [q.is_frozen for q in quantizers(model)]
    assert [q.grid for q in quantizers(copied)] == [q.grid for q in quantizers(model)]


def test_a_float_checkpoint_loads_strictly_after_prepare(small_net: Build, x: Tensor) -> None:
    trained, prepared = small_net(), prepare_(small_net(), x)
    prepared.load_state_dict(trained.state_dict(), strict=True)
    set_phase_(prepared, "float")
    assert torch.equal(prepared(x), trained(x))


@pytest.mark.parametrize("phase", ["noise", "int"])
def test_a_deep_copy_is_independent(model: nn.Module, x: Tensor, phase: str) -> None:
    set_phase_(model, phase)
    expected = model(x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        copied.stem_norm.running_mean.add_(1)
    changed = copied(x)
    assert torch.equal(model(x), expected)
    assert not torch.equal(changed, expected)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
            parameter.copy_(other)
        model.stem_norm.running_mean.add_(1)
    assert torch.equal(model(x), changed)
    restore_(copied)
    assert torch.equal(model(x), changed)


def test_a_prepared_model_moves_to_another_type_and_back(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    assert model.double()(x.double()).dtype == torch.float64
    assert torch.equal(model.float()(x), expected)


# ---------------------------------------------------------------------- sharing


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.again(torch.relu(self.second(torch.relu(self.first(x))))))


def test_tied_weights_share_one_quantizer_and_stay_tied() -> None:
    x = torch.randn(3, 4)
    plain = Sharing()
    keys, outputs = list(plain.state_dict()), plain(x)
    prepared = calibrate_(prepare_(plain, x), [x])
    first, second, third = layer_table(prepared)
    assert first.weight is second.weight is not third.weight
    assert first.input is not second.input
    assert len(quantizers(prepared)) == 5
    stored = prepared.first.parametrizations.weight
    assert stored.original is prepared.second.parametrizations.weight.original
    assert stored is prepared.again.parametrizations.weight
    copied = copy.deepcopy(prepared)
    assert layer_table(copied)[0].weight is layer_table(copied)[1].weight
    restored = restore_(prepared)
    assert restored.first.weight is restored.second.weight
    assert restored.first is restored.again
    assert list(restored.state_dict()) == keys
    assert torch.equal(restored(x), outputs)


def test_tied_weights_cannot_have_two_settings() -> None:
    plain, x = Sharing(), torch.randn(1, 4)
    with pytest.raises(ConfigError, match="second: expected the settings of first, with which it shares its weight"):
        prepare_(plain, x, Config(rules=[Rule("second", weight_bits=4)]))
    assert not [name for name, _ in plain.named_parameters() if "parametrizations" in name]


def test_a_tied_weight_with_one_float_input_evaluates_in_the_integer_domain() -> None:
    x = torch.randn(3, 4)
    for name in ("first", "second"):
        rules = [Rule(name, quantize_input=False)]
        prepared = calibrate_(prepare_(Sharing(), x, Config(rules=rules)), [x])
        expected = prepared.eval()(x)
        set_phase_(prepared, "int")
        torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-5)


def test_assigned_states_leave_shared_bits_shared() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    model, other = (
        nipq.prepare_(Pair(), torch.randn(5, 4), Config(shared_bits=("left", "right"), input_bits=None))
        for _ in range(2)
    )
    left, right = (row.weight for row in layer_table(model))
    with torch.no_grad():
        layer_table(other)[0].weight.bit_raw.fill_(1.5)
    model.load_state_dict(other.state_dict(), assign=True)
    assert left.bit_raw is right.bit_raw
    assert left.bit_raw.item() == 1.5


def test_assigning_a_state_to_tied_weights_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = nipq.prepare_(Tied(), torch.randn(5, 4))
    with pytest.raises(OrderError, match=r"second: .* found assign=True"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_a_copy_of_a_layer_beside_it_is_refused() -> None:
    model = nipq.prepare_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4))
    model.add_module("copy", copy.deepcopy(model[2]))
    with pytest.raises(OrderError, match="2: expected one prepared layer of that name, found '2' and 'copy'"):
        layer_table(model)
    assert not any(is_prepared(module) for module in nipq.restore_(model).modules())
