"""Batch-norm statistics of the quantized network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nipq.config import Config, Phase
from nipq.errors import ConfigError, NonFiniteError, OrderError
from nipq.prepare.layer_table import phase_of, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.batchnorm import reestimate_bn_, reestimate_bn_if_better_
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
    assert phase_of(model) is phase
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
    with pytest.raises(ConfigError, match="reestimate_bn_, batch 1: expected one input"):
        reestimate_bn_(model, [BATCHES[0], "text"])
    assert torch.equal(model.norm.running_var, before)
    plain = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="expected a batch norm with running statistics, found none"):
        reestimate_bn_(plain, [torch.zeros(1, 2)])
    with pytest.raises(OrderError, match="expected a prepared model"):
        reestimate_bn_(Net(), BATCHES)


@pytest.mark.parametrize("sizes", [(5, 1, 6), (1, 5, 6), (1,) * 12])
def test_a_batch_of_one_value_for_each_channel_counts_like_any_other(sizes: tuple[int, ...]) -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    calibrate_(prepare_(model, x[:2]), [x])
    update = reestimate_bn_(model, x.split(sizes))
    values = model[0].eval()(x).double()
    torch.testing.assert_close(model[1].running_mean.double(), values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), values.var(0), rtol=1e-5, atol=1e-6)
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())
    assert all(norm.training and norm.momentum == 0.1 for norm in (model[1], model[4]))
    update.undo()
    one, all_ = (reestimate_bn_(model, batches, statistics="relative") for batches in (x.split(sizes), [x]))
    assert [shift.std for shift in one.shifts] == pytest.approx([shift.std for shift in all_.shifts], rel=0.2)
    with pytest.raises(ConfigError, match="expected two values of each channel at least, found one"):
        reestimate_bn_(model, [x[:1]])


@pytest.mark.parametrize("statistics", ["absolute", "relative"])
def test_a_norm_that_no_batch_reaches_stays(statistics: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, expected = net(), net()
    expected.load_state_dict(model.state_dict())
    model.register_module("training_only", nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in model.training_only.state_dict().items()}
    update = reestimate_bn_(model, BATCHES, statistics=statistics)
    reestimate_bn_(expected, BATCHES, statistics=statistics)
    assert torch.equal(model.norm2.running_var, expected.norm2.running_var)
    assert all(torch.equal(before[name], value) for name, value in model.training_only.state_dict().items())
    assert caplog.messages == ["batch norms that no batch reached stay as they are: training_only"]
    assert update.unreached == ("training_only",)
    assert update.to_dict()["unreached"] == ["training_only"]
    assert "training_only: not reached, as before" in str(update)
    assert [shift.name for shift in update.shifts] == ["norm", "norm2"]


def test_norms_of_heads_that_evaluation_leaves_out_stop_nothing() -> None:
    model = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    calibrate_(model, [torch.randn(4, 2)])
    model.register_module("training_only", nn.Identity())
    model.training_only.register_module("norm", nn.BatchNorm1d(2))
    update = reestimate_bn_(model, [torch.randn(4, 2)])
    assert (update.unreached, update.shifts, update.batches) == (("training_only.norm",), (), 1)
    update.undo()


class Named(Net):
    """Gives batch norms their input by name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(input=self.second(torch.relu(self.norm(input=self.conv(x)))))


@pytest.mark.parametrize("statistics", ["absolute", "relative"])
def test_inputs_of_batch_norms_may_have_their_name(statistics: Any) -> None:
    torch.manual_seed(0)
    named, plain = (calibrate_(prepare_(Named(), BATCHES[0]), BATCHES) for _ in range(2))
    plain.load_state_dict(named.state_dict())
    plain.forward = lambda x: plain.norm2(plain.second(torch.relu(plain.norm(plain.conv(x)))))  # type: ignore[method-assign]
    updates = [reestimate_bn_(model, BATCHES, statistics=statistics) for model in (named, plain)]
    assert updates[0].to_dict() == updates[1].to_dict()
    assert updates[0].shifts[0].std != 1


def test_every_kind_of_averaging_is_measured_alike() -> None:
    """A cumulative average, and statistics that stood still in training: evaluation uses them all the same."""
    found = []
    for settings in ({}, {"momentum": None}, {"stands": True}):
        torch.manual_seed(0)
        model = net()
        model.norm.momentum = settings.get("momentum", 0.1)
        model.norm.track_running_stats = "stands" not in settings
        reestimate_bn_(model, BATCHES)
        found.append(model.norm.running_var.clone())
        assert (model.norm.momentum, model.norm.track_running_stats) == (
            settings.get("momentum", 0.1), "stands" not in settings,
        )  # fmt: skip
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_norms_without_statistics_are_left_out() -> None:
    model = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2), nn.BatchNorm1d(2)
    )
    calibrate_(prepare_(model, torch.randn(4, 2)), [torch.randn(4, 2)])
    update = reestimate_bn_(model, [torch.randn(8, 2)])
    assert ([shift.name for shift in update.shifts], update.unreached) == (["3"], ())


def test_statistics_that_are_not_finite_are_refused_by_name_and_undone() -> None:
    model = net()
    before = model.norm.running_mean.clone()
    bad = BATCHES[0].clone()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="norm: expected finite statistics, found NaN or infinity"):
        reestimate_bn_(model, [bad])
    assert torch.equal(model.norm.running_mean, before)


# ---------------------------------------------------------------------- relative statistics, and the guard


def trained(seed: int = 0) -> Net:
    """A float network whose statistics are those of its data."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(16, 2, 6, 6))
    return model.eval()


def quantized(model: Net, samples: list[torch.Tensor], bits: int = 3) -> Net:
    prepare_(model, samples[0], Config(weight_bits=bits, activation_bits=8))
    calibrate_(model, samples)
    set_phase_(model, Phase.ROUND)
    return model


def data(seed: int, scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(16, 2, 6, 6, generator=generator) + shift for _ in range(4)]


def test_relative_statistics_move_by_quantized_minus_float_on_the_same_samples() -> None:
    samples = data(1, 0.5, 1.0)  # unlike those that the network came with
    model = quantized(trained(), samples)
    mean, var = model.norm.running_mean.clone(), model.norm.running_var.clone()
    x = torch.cat(samples)
    with torch.no_grad():
        set_phase_(model, Phase.FLOAT)
        plain = model.conv(x).double()
        set_phase_(model, Phase.ROUND)
        rounded = model.conv(x).double()
    reestimate_bn_(model, samples, statistics="relative")
    axes = (0, 2, 3)
    expected = mean + (rounded.mean(axes) - plain.mean(axes))
    ratio = (rounded.var(axes) + model.norm.eps) / (plain.var(axes) + model.norm.eps)
    torch.testing.assert_close(model.norm.running_mean, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, (var * ratio).float(), rtol=1e-4, atol=1e-5)


def test_relative_statistics_of_a_network_that_does_not_round_stay() -> None:
    samples = data(1, 3.0, -2.0)
    model = quantized(trained(), samples, bits=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_bn_(model, samples, statistics="relative")
    for name in ("norm.running_mean", "norm2.running_mean", "norm.running_var", "norm2.running_var"):
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=0.02, atol=0.02)
    reestimate_bn_(model, samples)
    assert not torch.allclose(model.norm.running_mean, before["norm.running_mean"], atol=0.5)


def test_the_guard_refuses_statistics_that_move_outputs_away() -> None:
    samples = data(1, 3.0, 2.0)
    model = quantized(trained(), samples)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = reestimate_bn_if_better_(model, samples[:3], samples[3:], candidates=("absolute",))
    assert found.kept == "none"
    assert found.update is None
    assert found.distances["absolute"] > found.distances["none"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "kept none" in str(found)


def test_the_guard_keeps_the_nearest_and_has_a_way_back() -> None:
    samples = data(1, 3.0, 2.0)
    model = quantized(trained(), samples, bits=2)
    before = model.norm2.running_mean.clone()
    found = reestimate_bn_if_better_(model, samples[:3], samples[3:])
    assert found.kept == "relative"
    assert found.distances["relative"] < found.distances["none"] < found.distances["absolute"]
    assert found.to_dict()["kept"] == "relative"
    twin = quantized(trained(), samples, bits=2)
    reestimate_bn_(twin, samples[:3], statistics="relative")
    assert torch.equal(model.norm2.running_mean, twin.norm2.running_mean)
    assert found.update is not None
    found.update.undo()
    assert torch.equal(model.norm2.running_mean, before)


def test_the_guard_judges_by_a_float_network_that_it_is_given() -> None:
    """One that absolute statistics of the batches serve best, as its own are those of the batches."""
    samples = data(1, 3.0, 2.0)
    reference = trained()
    model = quantized(trained(), samples, bits=8)
    reestimate_bn_(quantized(reference, samples, bits=16), samples[:3])
    found = reestimate_bn_if_better_(model, samples[:3], samples[3:], reference=reference)
    assert found.kept == "absolute"


def test_a_guard_without_batch_norms_or_batches() -> None:
    plain = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    assert reestimate_bn_if_better_(plain, [], []).kept == "none"
    with pytest.raises(ConfigError, match="held-out data: expected at least one batch"):
        reestimate_bn_if_better_(net(), BATCHES, [])
    with pytest.raises(ConfigError, match="expected statistics 'absolute' or 'relative', found 'best'"):
        reestimate_bn_(net(), BATCHES, statistics="best")  # type: ignore[arg-type]
