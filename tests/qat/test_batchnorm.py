"""Batch-norm statistics of the quantized network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nipq.config import Phase
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.batchnorm import reestimate_bn_
from nipq.qat.calibrate import calibrate_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.second, self.norm2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.second(self.drop(self.norm(self.conv(x)).relu())))


BATCHES = [torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 2)]


def net() -> Net:
    model = Net()
    prepare_(model, BATCHES[0])
    calibrate_(model, BATCHES)
    model.get_submodule("conv.parametrizations.weight.0").freeze_bits_(2)
    return model


def test_the_statistics_are_those_of_all_values_of_the_rounded_network() -> None:
    model = net().train()
    reestimate_bn_(model, BATCHES)
    model.eval()
    with torch.no_grad():
        values = torch.cat([model.conv(x) for x in BATCHES]).double()
    torch.testing.assert_close(model.norm.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), values.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert model.norm.num_batches_tracked == 3


def test_later_norms_see_what_batch_statistics_make_of_each_batch() -> None:
    model = net()
    reestimate_bn_(model, BATCHES[:1])
    model.eval()
    with torch.no_grad():
        first = nn.functional.batch_norm(
            model.conv(BATCHES[0]), None, None, model.norm.weight, model.norm.bias, training=True
        )
        values = model.second(first.relu())
    torch.testing.assert_close(model.norm2.running_mean, values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm2.running_var, values.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phase", [Phase.NOISE, Phase.FLOAT, Phase.INT])
def test_modes_phases_and_momenta_come_back(phase: Phase) -> None:
    model = net().eval()
    model.drop.train()
    model.norm.momentum = 0.3
    set_phase_(model, phase)
    reestimate_bn_(model, BATCHES)
    assert [name for name, module in model.named_modules() if module.training] == ["drop"]
    assert {row.weight.phase for row in layer_table(model)} == {phase}
    assert model.norm.momentum == 0.3
    assert not model.norm._forward_hooks


def test_the_handle_says_how_far_and_undoes() -> None:
    model = net()
    with torch.no_grad():
        model.norm.running_var.fill_(4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update = reestimate_bn_(model, BATCHES, batches=2)
    shift = update.to_dict()["shifts"][0]
    moved = model.norm.running_mean.double() / (4 + model.norm.eps) ** 0.5
    assert update.batches == 2
    assert shift["name"] == "norm"
    assert shift["mean"] == pytest.approx(moved.square().mean().sqrt().item())
    assert shift["std"] == pytest.approx((model.norm.running_var / 4).log().mean().div(2).exp().item(), rel=1e-4)
    assert str(update).startswith("2 batch norms from 2 batches\nnorm: mean moved")
    update.undo()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_measured_is_refused_and_changes_nothing() -> None:
    model = net()
    before = model.norm.running_var.clone()
    with pytest.raises(ConfigError, match="expected at least one batch, found an empty loader"):
        reestimate_bn_(model, [])
    with pytest.raises(ConfigError, match="loader: expected batches"):
        reestimate_bn_(model, [BATCHES[0], "text"])
    assert torch.equal(model.norm.running_var, before)
    plain = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="expected a batch norm with running statistics, found none"):
        reestimate_bn_(plain, [torch.zeros(1, 2)])
    with pytest.raises(OrderError, match="expected a prepared model"):
        reestimate_bn_(Net(), BATCHES)


def test_a_norm_that_no_batch_reaches_is_refused() -> None:
    model = net()
    model.register_module("unused", nn.BatchNorm2d(3))
    with pytest.raises(OrderError, match="expected the batches to reach every batch norm"):
        reestimate_bn_(model, BATCHES)
