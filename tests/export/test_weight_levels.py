"""Balanced and full weight levels, from preparing to every kind of file."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.config import BitRange
from nipq.errors import ConfigError, FileFormatError
from nipq.functional.grid import BALANCED, FULL
from nipq.functional.packing import whole_codes
from nipq.nn.deployed import deployed_layers
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.convert import deploy_copy, freeze_at_whole_bits_
from nipq.prepare.layer_table import layer_table, set_bits_

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
GRIDS = {"balanced": BALANCED, "full": FULL}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -0.7, 0.5, -1.2, 0.9, 0.0]))  # codes change their sign in files
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def trained(levels: str, granularity: str, bits: int) -> nn.Module:
    """Two steps of noise and two of rounding."""
    config = nipq.Config(weight_levels=levels, granularity=granularity, weight_bits={bits, 8}, activation_bits=8)
    model = nipq.prepare_(network(), X[:1], config)
    optimizer = torch.optim.SGD(nipq.param_groups(model), lr=0.01)
    budget = nipq.AverageBits(weights=bits)
    session = nipq.QATSession(model, budget, 4, loader=[X], optimizer=optimizer, allocation_batches=1)
    for _ in range(4):
        model.train()
        (model(X).square().mean() + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    return model


@pytest.mark.parametrize(
    ("levels", "bits", "granularity"),
    [("balanced", 2, "tensor"), ("balanced", 3, "channel"), ("balanced", 4, "tensor"), ("full", 2, "channel")],
)
def test_the_whole_way_to_files(levels: str, bits: int, granularity: str, tmp_path: Path) -> None:
    model = trained(levels, granularity, bits)
    deployed = nipq.convert(model, X)
    known = whole_codes(bits, GRIDS[levels])
    found = [np.unique(layer.weight_codes.numpy()) for layer in deployed_layers(deployed).values()]
    assert all(set(codes) <= set(known) for codes in found)
    assert any(len(codes) == 2**bits for codes in found)  # all levels are used
    expected = model(X)
    assert float((deployed(X) - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())

    path = tmp_path / "model.nipq.safetensors"
    nipq.save(deployed, path)
    back = nipq.load(path, network())
    assert torch.equal(back(X), deployed(X))
    artifacts: list[nn.Module | Path] = [deployed, path]
    for name in ("model.onnx", "model.qonnx.onnx", "model.npz", "model.pt2"):
        nipq.export(deployed, tmp_path / name, X)
        artifacts.append(tmp_path / name)
    for artifact in artifacts:
        report = nipq.verify(model, artifact, [X])
        assert report, str(report)


def test_codes_of_8_bits_are_symmetric_at_once_or_from_the_freeze_on() -> None:
    fixed = nipq.prepare_(network(), X[:1], nipq.Config(weight_levels="balanced", weight_bits=8))
    assert {row.weight.grid.kind for row in layer_table(fixed)} == {"signed"}
    learned = nipq.prepare_(network(), X[:1], nipq.Config(weight_levels="balanced"))
    assert {row.weight.grid.kind for row in layer_table(learned)} == {"balanced"}
    for number, row in enumerate(layer_table(learned)):
        row.weight.freeze_bits_(7 + number)
    assert [row.weight.grid.kind for row in layer_table(learned)] == ["balanced", "signed", "signed"]


def test_fewer_bits_bring_the_balanced_grid_back() -> None:
    for bits in (8, (2, 8)):
        model = nipq.prepare_(network(), X[:1], nipq.Config(weight_levels="balanced", weight_bits=bits))
        nipq.calibrate_(model, [X])
        for now, kind in ((8, "signed"), (2, "balanced"), (9, "signed"), (7, "balanced")):
            set_bits_(model, now)
            again = nipq.prepare_(network(), X[:1], nipq.Config(weight_levels="balanced", weight_bits=bits))
            again.load_state_dict(model.state_dict())
            for each in (model, again):
                assert {row.weight.grid.kind for row in layer_table(each)} == {kind}
        set_bits_(again, 3)
        assert {row.weight.grid.kind for row in layer_table(again)} == {"balanced"}


def test_a_symmetric_state_stays_symmetric_in_a_model_that_asked_for_balanced_levels() -> None:
    model = nipq.calibrate_(nipq.prepare_(network(), X[:1], nipq.Config(weight_bits=4)), [X])
    other = nipq.prepare_(network(), X[:1], nipq.Config(weight_bits=4, weight_levels="balanced"))
    other.load_state_dict(model.state_dict())
    set_bits_(other, 3)
    assert {row.weight.grid.kind for row in layer_table(other)} == {"signed"}


@pytest.mark.parametrize("bits", [(2, 14), (4, 12), (8, 16)])
def test_learned_bits_that_start_at_8_or_more_are_prepared_and_deployed(bits: tuple[int, int]) -> None:
    model = nipq.prepare_(network(), X[:1], nipq.Config(weight_levels="balanced", weight_bits=bits))
    nipq.calibrate_(model, [X])
    found = deploy_copy(model)
    assert {layer.weight_grid for layer in deployed_layers(found).values()} == {"signed"}
    assert not any(row.weight.is_frozen for row in layer_table(model))
    frozen = copy.deepcopy(model)
    freeze_at_whole_bits_(frozen)
    expected = frozen.eval()(X).detach()
    assert float((found(X) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_full_grid_of_16_bits_fits_no_exchange_format_and_is_refused_by_name(tmp_path: Path) -> None:
    config = nipq.Config(weight_levels="full", weight_bits=16, activation_bits=8)
    model = nipq.calibrate_(nipq.prepare_(network(), X[:1], config), [X])
    deployed = nipq.convert(model)
    for name in ("model.onnx", "model.qonnx.onnx"):
        with pytest.raises(
            ConfigError, match=r"0: expected weight codes that fit 16 bits in either sign, found a full"
        ):
            nipq.export(deployed, tmp_path / name, X)
    nipq.export(deployed, tmp_path / "model.npz", X)
    assert nipq.verify(model, nipq.save(deployed, tmp_path / "model.nipq.safetensors"), [X])


def test_grids_of_weights_are_refused_for_inputs() -> None:
    for grid in GRIDS.values():
        with pytest.raises(
            ConfigError, match=f"1.input: expected a signed, unsigned or shifted .*found a {grid.kind} one"
        ):
            InputQuantizer("1.input", BitRange(), grid=grid)


def test_a_rule_gives_one_layer_other_levels_and_the_state_dict_keeps_them() -> None:
    config = nipq.Config(weight_bits=3, rules=[nipq.Rule("6", weight_levels="balanced")])
    model = nipq.prepare_(network(), X[:1], config)
    assert [row.weight.grid.kind for row in layer_table(model)] == ["signed", "signed", "balanced"]
    other = nipq.prepare_(network(), X[:1], nipq.Config(weight_bits=3))
    other.load_state_dict(model.state_dict())
    assert [row.weight.grid.kind for row in layer_table(other)] == ["signed", "signed", "balanced"]


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight_levels: expected 'symmetric', 'balanced' or 'full', found 'ternary'"):
        nipq.Config(weight_levels="ternary")


@pytest.mark.parametrize("levels", ["balanced", "full"])
def test_another_grid_in_a_packed_file_is_refused(levels: str, tmp_path: Path) -> None:
    deployed = nipq.convert(trained(levels, "tensor", 3))
    path = tmp_path / "model.nipq.safetensors"
    nipq.save(deployed, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(f'\\"grid\\":\\"{levels}\\"'.encode(), f'\\"grid\\":\\"{levels[::-1]}\\"'.encode()))
    with pytest.raises(FileFormatError):
        nipq.load(path, network())


def test_the_size_promised_before_training_is_kept(tmp_path: Path) -> None:
    config = nipq.Config(weight_levels="balanced", weight_bits={2, 4, 8})
    model = nipq.calibrate_(nipq.prepare_(network(), X[:1], config), [X])
    budget = nipq.ModelSize("2.5 kB")
    nipq.allocate_bits_(model, [X], budget, batches=1)
    nipq.freeze_bits_(model, budget)
    path = tmp_path / "model.nipq.safetensors"
    nipq.save(nipq.convert(model), path)
    assert path.stat().st_size <= 2500


def test_ranges_that_are_fitted_for_symmetric_levels_are_refused_with_others() -> None:
    with pytest.raises(ConfigError, match="expected weight_levels 'symmetric' with method 'pact'"):
        nipq.Config(method="pact", rules=[nipq.Rule("6", weight_levels="full")])


@pytest.mark.parametrize("method", ["lsq", "lsq+", "diffq", "ste"])
def test_baselines_train_on_balanced_levels(method: str) -> None:
    config = nipq.Config(method=method, weight_levels="balanced", weight_bits=3, activation_bits=8)
    model = nipq.calibrate_(nipq.prepare_(network(), X[:1], config), [X]).train()
    loss: Tensor = model(X).square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
