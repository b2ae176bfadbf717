"""Noise of the stated strength, on what the network computes with, and gone afterwards."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nipq.analysis.network import layers
from nipq.analysis.perturbation import perturbation_sweep, perturbed
from nipq.config import Config
from nipq.errors import OrderError
from nipq.prepare.layer_table import set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("quantize", [False, True])
def test_the_noise_has_the_stated_strength_and_is_drawn_after_rounding(quantize) -> None:
    model, x = nn.Sequential(nn.Linear(200, 150)).eval(), torch.randn(100, 200)
    if quantize:
        prepare_(model, x[:1], Config(weight_bits=3, input_bits=4))
        calibrate_(model, [x])
        set_phase_(model, "round")
    clean = model[0].weight.detach().clone()
    with perturbed(model, weights=0.1, seed=1):
        noise = model[0].weight.detach() - clean
        assert torch.equal(noise, model[0].weight.detach() - clean)  # drawn once
    assert rms(noise) == pytest.approx(0.1 * rms(clean), rel=0.02)  # 30,000 numbers: 0.4 % standard error
    assert abs(float(noise.mean())) < 4 * rms(noise) / noise.numel() ** 0.5
    assert torch.equal(model[0].weight, clean)
    seen = []
    with perturbed(model, activations=0.2, seed=2):
        handle = model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x)
        model(x)
        handle.remove()
    read = model[0].quantization.input(x) if quantize else x
    for noisy in seen:
        assert rms(noisy - read) == pytest.approx(0.2 * rms(read), rel=0.03)
    assert not torch.equal(seen[0], seen[1])


def test_a_perturbed_network_differs_and_comes_back_to_the_bit(network, batches, unchanged) -> None:
    images = batches[0][0]
    with unchanged(network):
        clean = network(images)
        for settings in ({"weights": 0.1}, {"activations": 0.1}, {"weights": 0.1, "activations": 0.1}):
            outputs = []
            for seed in (0, 0, 1):
                with perturbed(network, **settings, seed=seed):
                    outputs.append(network(images))
            assert torch.equal(outputs[0], outputs[1])
            assert not torch.equal(outputs[0], outputs[2])
            assert not torch.equal(outputs[0], clean)
        with pytest.raises(KeyboardInterrupt), perturbed(network, weights=1.0, activations=1.0):
            raise KeyboardInterrupt
        assert torch.equal(network(images), clean)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(3, 2), (500, 40, 3), 2),
        (nn.Conv2d(3, 2, 1), (50, 3, 20, 20), 1),
        (nn.ConvTranspose1d(3, 2, 1), (50, 3, 400), 1),
    ],
)
def test_noise_relative_to_channels_leaves_silent_ones_alone(layer, shape, axis) -> None:
    scales = torch.tensor([0.0, 1.0, 10.0]).reshape([3 if place == axis else 1 for place in range(len(shape))])
    x, seen = scales * torch.randn(shape), []
    with perturbed(layer, activations=0.1, relative_to="channel"):
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0] - x))
        layer(x)
        handle.remove()
    silent, quiet, loud = (rms(part) for part in seen[0].unbind(axis))
    assert silent == 0
    assert quiet == pytest.approx(0.1, rel=0.03)
    assert loud == pytest.approx(1.0, rel=0.03)


def test_strength_zero_changes_nothing(quantized, batches) -> None:
    clean = quantized(batches[0][0])
    with perturbed(quantized):
        assert torch.equal(quantized(batches[0][0]), clean)


def test_a_shared_weight_is_perturbed_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepare_(model, torch.zeros(1, 4))
    calibrate_(model, [torch.randn(8, 4)])
    set_phase_(model.eval(), "round")
    with perturbed(model, weights=0.3):
        assert torch.equal(model[0].weight, model[2].weight)


def test_layers_that_stay_float_are_left_alone(batches) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    prepare_(model, batches[0][0][:1], Config(rules=({"pattern": "1", "quantize": False},)))
    assert list(layers(model)) == ["0"]


def test_whole_codes_are_refused(quantized) -> None:
    set_phase_(quantized, "int")
    with pytest.raises(OrderError, match='phase "round" to perturb, found "int"'), perturbed(quantized, weights=0.1):
        pass


def test_a_sweep_has_every_strength_and_seed_and_is_plain_data(quantized, batches, score, unchanged) -> None:
    with unchanged(quantized):
        found = perturbation_sweep(
            quantized, batches, score, weights=(0.01, 1.0), activations=(1.0,), channels=(0.5,), seeds=(0, 1)
        ).to_dict()
    assert json.loads(json.dumps(found))["measured"] == "perturbation"
    settings = [tuple(point["setting"].values()) for point in found["points"]]
    assert settings == [
        ("none", 0.0, 0),
        *[("weights", strength, seed) for strength in (0.01, 1.0) for seed in (0, 1)],
        *[("activations", 1.0, seed) for seed in (0, 1)],
        *[("channels", 0.5, seed) for seed in (0, 1)],
    ]
    losses = [point["scores"]["loss"] for point in found["points"]]
    assert losses[0] == score(quantized, batches)["loss"]
    assert abs(losses[1] - losses[0]) < abs(losses[3] - losses[0])
