"""Small nets with everything a deployed layer can be, trained in no way but with sensible statistics."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import hardswish, pad, relu

from nipq.config import Config, Rule
from nipq.prepare.layer_table import layer_table, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


class SameConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(pad(input, (0, 1, 0, 1)), self.weight, self.bias)


class Mixed(nn.Module):
    """conv-bn-relu, a depthwise one, a residual sum, hard-swish, a subclass, reflected padding, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
        self.depthwise_bn = nn.BatchNorm2d(8, affine=False)
        self.point = SameConv(8, 8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem_bn(self.stem(x)))
        x = hardswish(x + self.depthwise_bn(self.depthwise(x)))
        x = self.point(x)
        return self.head(self.norm(x.mean((2, 3))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.table  # one module under two names

    def forward(self, x: Tensor) -> Tensor:
        return self.again(relu(self.second(relu(self.first(x)))))


class UpsizedTo(nn.Module):
    """A transposed convolution that is called with an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(input=x, output_size=[12, 12])


def with_statistics(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight)  # negative ones, too
    return net.eval()


DEFAULT = Config()
CHANNEL = Config(granularity="channel")


@dataclass(frozen=True)
class Case:
    """A net, its input and its settings."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    config: Config = DEFAULT


CASES = {
    "mixed": Case(Mixed, (4, 3, 8, 8)),
    "mixed per channel": Case(Mixed, (4, 3, 8, 8), CHANNEL),
    "weights only": Case(Mixed, (4, 3, 8, 8), Config(quantize_inputs=False, granularity="channel")),
    "float input and a float layer": Case(
        Mixed, (4, 3, 8, 8), Config(input_bits=None, rules=(Rule("point", quantize=False),))
    ),
    "16 bits": Case(Mixed, (2, 3, 8, 8), Config(weight_bits=16, activation_bits=16)),
    "tied": Case(Tied, (4, 6)),
    "upsized": Case(UpsizedTo, (2, 4, 5, 5), CHANNEL),
    "transposed, grouped": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)
    ),
    "transposed, grouped, weights only": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), (2, 4, 5, 5), Config(quantize_inputs=False)
    ),
    "one axis": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1)), (3, 2, 9), CHANNEL
    ),
    "three axes": Case(lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 2, 4, 4, 4)),
    "linear": Case(lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), (6, 7)),
    "a lone layer": Case(lambda: nn.Linear(7, 5), (6, 7)),
}


@dataclass(frozen=True)
class Trained:
    """A prepared model with frozen bits, and how to build its float copy."""

    model: nn.Module
    inputs: Tensor
    build: Callable[[], nn.Module]


def trained(name: str, *, freeze: bool = True) -> Trained:
    case = CASES[name]
    torch.manual_seed(1)
    inputs = torch.randn(case.shape)
    model = with_statistics(case.build())
    prepare_(model, inputs, case.config)
    calibrate_(model, [inputs])
    draw = random.Random(name)
    for quantizer in quantizers(model):
        if freeze and not quantizer.is_frozen:
            quantizer.freeze_bits_(draw.randint(2, 10))
    assert layer_table(model)
    return Trained(model, inputs, case.build)


@pytest.fixture(params=CASES)
def every(request: pytest.FixtureRequest) -> Trained:
    """Each case in turn."""
    return trained(request.param)


@pytest.fixture
def mixed() -> Trained:
    return trained("mixed")


@pytest.fixture
def get() -> Callable[..., Trained]:
    """Any case by name."""
    return trained
