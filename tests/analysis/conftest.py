"""A small trained-looking network, quantized and float, and what shows that it was not changed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits
from nipq.budget.freeze import freeze_bits_
from nipq.config import Config
from nipq.prepare.layer_table import set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


@pytest.fixture
def score():
    """Mean loss of a model on batches."""

    def mean_loss(model: nn.Module, batches) -> dict[str, float]:
        with torch.no_grad():
            losses = [float(cross_entropy(model.eval()(images), labels)) for images, labels in batches]
        return {"loss": sum(losses) / len(losses)}

    return mean_loss


def build() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def quantize_(model: nn.Module, batches, **settings) -> nn.Module:
    prepare_(model, batches[0][0][:1], Config(**settings))
    calibrate_(model, batches)
    freeze_bits_(model, AverageBits(5, 5))
    set_phase_(model, "round")
    return model.eval()


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that a measurement could leave changed, values to the bit."""
    found: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        hooks = (len(module._forward_pre_hooks), len(module._forward_hooks))
        found[f"{name} mode and hooks"] = (module.training, hooks, "forward" in module.__dict__)
    for name, parameter in model.named_parameters():
        found[f"{name} identity"] = (id(parameter), parameter.requires_grad)
    return found


@pytest.fixture
def unchanged():
    """A context inside which a model must come back to what it was, to the bit."""

    @contextmanager
    def check(model: nn.Module):
        before = fingerprint(model)
        yield
        after = fingerprint(model)
        assert before.keys() == after.keys()
        for name, value in before.items():
            other = after[name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name

    return check


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    return [(images[:16], torch.arange(16) % 3), (images[16:], torch.arange(8) % 3)]


@pytest.fixture(params=["float", "nipq", "channel", "diffq", "lsq+"])
def network(request, batches):
    """Float, quantized, and by methods that take boundaries from weights or learn an offset."""
    settings = {
        "nipq": {},
        "channel": {"granularity": "channel"},
        "diffq": {"method": "diffq", "init": "max"},
        "lsq+": {"method": "lsq+"},
    }
    if request.param == "float":
        return build()
    return quantize_(build(), batches, **settings[request.param])


@pytest.fixture
def quantized(batches):
    return quantize_(build(), batches)
