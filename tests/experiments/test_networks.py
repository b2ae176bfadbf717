from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from experiments.tasks.networks import edsr, mobilenet_v3_32, resnet18_32
from nipq.config import Config
from nipq.prepare.layer_table import layer_table, quantizers, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_

NETWORKS = {"mobilenet_v3_32": mobilenet_v3_32, "resnet18_32": lambda: resnet18_32(width=8), "edsr": lambda: edsr(8, 2)}


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32) - 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_can_be_prepared_whole_and_trained(name: str) -> None:
    model, x = NETWORKS[name]().train(), images()
    assert not [finding for finding in validate(model, x[:1]) if finding.severity == "error"]
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    prepare_(model, x[:1], Config(init="max", learn_input_range=True))
    assert len(layer_table(model)) == layers
    calibrate_(model, [x])
    set_phase_(model, "noise")
    model(x).square().mean().backward()
    for quantizer in quantizers(model):
        for parameter in quantizer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("name", "least", "most"), [("mobilenet_v3_32", 100_000, 200_000), ("edsr", 0, 10_000)])
def test_a_network_is_as_small_as_it_says(name: str, least: int, most: int) -> None:
    assert least <= sum(parameter.numel() for parameter in NETWORKS[name]().parameters()) <= most


@pytest.mark.parametrize("build", [mobilenet_v3_32, resnet18_32])
def test_the_stem_s_stride_and_the_classes_are_those_asked_for(build: type) -> None:
    shapes = []
    for stride in (1, 2):
        model = build(classes=5, stem_stride=stride).eval()
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        shapes.append(stem(images()).shape[-1])
        assert model(images()).shape == (2, 5)
    assert shapes == [32, 16]


def test_an_edsr_whose_last_layer_is_zero_is_bicubic() -> None:
    model, x = edsr(8, 1), images()
    nn.init.zeros_(model.tail.weight)
    nn.init.zeros_(model.tail.bias)
    expected = interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    assert expected.shape == (2, 3, 64, 64)
    assert torch.equal(model(x), expected)
