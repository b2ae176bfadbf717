"""Deployed models of every kind of layer, their numbers drawn at random rather than trained."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nipq.functional.grid import Grid, levels
from nipq.nn.deployed import DeployedLayer, DeployedWeightOnlyLayer, become_, deployed_layers
from nipq.nn.kinds import output_channels
from nipq.nn.layers import plain_shell

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
SHAPES = {0: (7,), 1: (4, 9), 2: (4, 6, 5), 3: (4, 4, 3, 3)}


class Numbers(NamedTuple):
    """What a layer is to be deployed with; ``input_bits`` None leaves its input float."""

    weight_bits: int = 4
    input_bits: int | None = 5
    grid: str = "unsigned"
    groups: int = 1


class Zoo(nn.Module):
    """One layer of each kind side by side, each with a batch norm; one input for each number of axes."""

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for kind, count in zip(KINDS, groups, strict=True):
            axes = axes_of(kind)
            if kind == "Linear":
                self.layers[kind] = nn.Linear(7, 6)
            else:
                stride = 1 if count == 1 else 2
                self.layers[kind] = getattr(nn, kind)(4, 6, 3, stride=stride, padding=1, groups=count)
            self.norms[kind] = getattr(nn, f"BatchNorm{max(axes, 1)}d")(6)

    def forward(self, rows: Tensor, line: Tensor, image: Tensor, volume: Tensor) -> tuple[Tensor, ...]:
        given = (rows, line, image, volume)
        return tuple(self.norms[kind](self.layers[kind](given[axes_of(kind)])) for kind in KINDS)


def axes_of(kind: str) -> int:
    return 0 if kind == "Linear" else int(kind[-2])


def deploy(layer: nn.Module, numbers: Numbers, batchnorm: str | None) -> nn.Module:
    """A layer with random codes; scales of both signs where a batch norm allows it."""
    top = 2 ** (numbers.weight_bits - 1) - 1
    dtype = torch.int8 if numbers.weight_bits <= 8 else torch.int16
    weight = torch.randint(-top, top + 1, layer.weight.shape).to(dtype)
    channels = output_channels(layer)
    gain = torch.rand(channels) + 0.1
    if batchnorm is not None:
        gain = gain * torch.where(torch.rand(channels) < 0.5, -1.0, 1.0)
    if numbers.input_bits is None:
        return DeployedWeightOnlyLayer(
            plain_shell(layer),
            weight,
            torch.tensor([0.7 / top]),
            torch.randn(channels),
            weight_bits=numbers.weight_bits,
        )
    n = int(levels(torch.tensor(float(numbers.input_bits)), Grid(numbers.grid)))
    zero_point = round(0.3 * n) if numbers.grid == "shifted" else 0
    step = torch.tensor([2.0 / n]) * (0.9 + 0.2 * torch.rand(1))
    return DeployedLayer(
        plain_shell(layer),
        weight,
        gain * float(step) / top,
        torch.randn(channels),
        step,
        weight_bits=numbers.weight_bits,
        input_bits=numbers.input_bits,
        grid=numbers.grid,
        zero_point=zero_point,
        code_range=(-n, n) if numbers.grid == "signed" else (-zero_point, n - zero_point),
        batchnorm=batchnorm,
    )


def deployed_zoo(numbers: Sequence[Numbers]) -> nn.Module:
    model = Zoo([each.groups for each in numbers]).eval()
    swaps: dict[nn.Module, nn.Module] = {}
    for kind, each in zip(KINDS, numbers, strict=True):
        folded = each.input_bits is not None
        swaps[model.layers[kind]] = deploy(model.layers[kind], each, f"norms.{kind}" if folded else None)
        if folded:
            swaps[model.norms[kind]] = nn.Identity()
    for layer, form in swaps.items():
        become_(layer, form)
    return model.eval().requires_grad_(False)


def zoo_inputs(batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *SHAPES[axes]) for axes in range(4))


def deployed_alone(layer: nn.Module, numbers: Numbers | None = None) -> nn.Module:
    """A model that is one layer, with scales of both signs."""
    return nn.Sequential(deploy(layer, numbers or Numbers(), "norm")).eval().requires_grad_(False)


@torch.no_grad()
def calls_of(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each deployed layer, by name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: found.__setitem__(name, (args[0], output)))
        for name, layer in deployed_layers(model).items()
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def apart(found: Any, expected: Any) -> float:
    """Largest difference, in units of the largest expected value."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def zoo() -> SimpleNamespace:
    """Everything here, for tests that draw their own numbers."""
    return SimpleNamespace(
        kinds=KINDS,
        numbers=Numbers,
        undeployed=Zoo,
        deployed=deployed_zoo,
        inputs=zoo_inputs,
        alone=deployed_alone,
        calls_of=calls_of,
        apart=apart,
    )


@pytest.fixture
def conv() -> nn.Module:
    """A model of one convolution of 4 x 6 x 5 pictures, weights of 4 bits and inputs of 5."""
    return deployed_alone(nn.Conv2d(4, 6, 3, padding=1))


@pytest.fixture
def picture() -> Tensor:
    return torch.randn(2, 4, 6, 5)
