"""``grid="auto"`` behind GELU and SiLU: shifted where that has less squared error, which large activations decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.functional.clipping import noise_optimal_range
from nipq.functional.grid import SIGNED, Grid
from nipq.functional.uniform import quantize
from nipq.nn.init import SHIFTS
from nipq.prepare.layer_table import layer_table


def error(x: Tensor, grid: Grid, bits: float) -> float:
    return float((quantize(x, noise_optimal_range(x, bits, grid), bits, grid) - x).square().mean())


def check(model: nn.Module, batch: Any, name: str, shift: float, expected: str) -> None:
    """The grid in front of a layer is the expected one, and the one with less squared error."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().flatten()))
    nipq.prepare.trace.call_model(model, batch)
    handle.remove()
    nipq.calibrate_(nipq.prepare_(model, batch, nipq.Config(activation_bits=4)), [batch])
    (row,) = (row for row in layer_table(model) if row.name == name)
    assert row.input.grid == (Grid("shifted", shift) if expected == "shifted" else SIGNED)
    shifted, signed = (error(seen[0], grid, 4.0) for grid in (Grid("shifted", shift), SIGNED))
    assert (shifted < signed) == (expected == "shifted")


@pytest.mark.parametrize(("gain", "expected"), [(60.0, "shifted"), (1.0, "signed")])
@pytest.mark.parametrize(
    ("model", "before", "name"),
    [
        ("bert", "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
        ("timm vit", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
    ],
)
def test_behind_gelu(model: str, before: str, name: str, gain: float, expected: str, model_named: Any) -> None:
    subject = model_named(model)
    built = subject.build()
    with torch.no_grad():
        built.get_submodule(before).weight.mul_(gain)
    check(built, subject.batch, name, SHIFTS["gelu"], expected)


@pytest.mark.parametrize(("gain", "expected"), [(10.0, "shifted"), (0.1, "signed")])
def test_behind_silu(gain: float, expected: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight.mul_(gain)
    check(model, torch.randn(64, 8), "2", SHIFTS["silu"], expected)
