"""The robustness study: its disturbances in closed form, and the numbers of its table."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from experiments.robustness import curves
from experiments.robustness.corruption import corrupt
from experiments.robustness.landscape import filter_normalised_direction, landscape
from experiments.robustness.perturbation import lowered_bits, perturbed
from nipq.budget.budget import AverageBits
from nipq.budget.freeze import freeze_bits_
from nipq.config import Config
from nipq.functional.clipping import noise_optimal_range
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

BLACK, WHITE = -0.8, 2.2


@pytest.fixture
def images():
    """Smooth blobs between black and white, three channels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 10, 10, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")
    return BLACK + (WHITE - BLACK) * smooth


def worse(images, name, severity, **settings):
    return corrupt(images, name, severity, black=BLACK, white=WHITE, **settings)


def test_noise_has_the_stated_deviation_and_share() -> None:
    grey = torch.full((4, 1, 100, 100), 0.5)
    noisy = corrupt(grey, "gaussian_noise", 2, black=0, white=1)
    assert float(noisy.std()) == pytest.approx(0.08, rel=0.03)
    spots = corrupt(grey, "impulse_noise", 4, black=0, white=1)
    assert float((spots != 0.5).float().mean()) == pytest.approx(0.11, abs=0.007)  # 4 standard errors
    assert float((spots == 1).float().mean()) == pytest.approx(0.055, abs=0.005)


def test_blur_keeps_a_plain_image_and_the_sum_of_a_point() -> None:
    grey = torch.full((1, 2, 32, 32), 0.3)
    assert torch.allclose(corrupt(grey, "blur", 5, black=0, white=1), grey, atol=1e-6)
    point = torch.zeros(1, 1, 32, 32)
    point[0, 0, 16, 16] = 1
    spread = corrupt(point, "blur", 3, black=0, white=1)
    assert float(spread.sum()) == pytest.approx(1, rel=1e-5)
    row = spread[0, 0].sum(0)
    variance = float((row * (torch.arange(32) - 16.0) ** 2).sum())
    assert variance == pytest.approx(1, rel=0.05)  # sigma 1 pixel of 32, cut off at 3 sigma


def test_contrast_brightness_pixelate_and_occlusion_are_their_formulas(images) -> None:
    unit = (images - BLACK) / (WHITE - BLACK)
    mean = unit.mean(dim=(1, 2, 3), keepdim=True)
    expected = BLACK + (WHITE - BLACK) * (mean + 0.8 * (unit - mean))
    assert torch.allclose(worse(images, "contrast", 2), expected, atol=1e-5)
    assert torch.allclose(worse(images, "brightness", 1), (images + 0.03 * (WHITE - BLACK)).clamp(max=WHITE), atol=1e-5)
    blocks = worse(images, "pixelate", 3).reshape(6, 3, 7, 4, 7, 4)  # an eighth of 28, rounded
    expected = images.reshape(blocks.shape).mean(dim=(3, 5), keepdim=True)
    assert torch.allclose(blocks, expected.expand_as(blocks), atol=1e-5)
    covered = (worse(images, "occlusion", 5) - (BLACK + WHITE) / 2).abs() < 1e-6
    assert covered.all(1).sum(dim=(1, 2)).tolist() == [round(0.55 * 28) ** 2] * 6


def build() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    return [(images[:16], torch.arange(16) % 3), (images[16:], torch.arange(8) % 3)]


@pytest.fixture
def quantized(batches):
    model = build()
    prepare_(model, batches[0][0][:1], Config())
    calibrate_(model, batches)
    freeze_bits_(model, AverageBits(5, 5))
    set_phase_(model, "round")
    return model.eval()


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


def test_inputs_are_fitted_on_what_the_quantized_network_computes(quantized, batches) -> None:
    row = layer_table(quantized)[1]
    kept = []
    handle = row.input.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten()))
    for images, _ in batches:
        quantized(images)
    handle.remove()
    with lowered_bits(quantized, 1, boundaries="refit", batches=batches):
        fitted = noise_optimal_range(torch.cat(kept), float(row.input.bits_rounded), row.input.grid)
        assert torch.allclose(row.input.alpha, fitted, rtol=1e-5)


def test_output_channels_of_transposed_convolutions_are_filters_and_zero_filters_stay() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ConvTranspose2d(4, 4, 2, groups=2))
    nn.init.zeros_(model[0].weight[:, 2])
    first, grouped = filter_normalised_direction(model, 0).values()
    found, wanted = (x.detach().square().sum(dim=(0, 2, 3)) for x in (first, model[0].weight))
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert float(first[:, 2].abs().max()) == 0
    assert float(grouped.norm()) == pytest.approx(float(model[1].weight.detach().norm()), rel=1e-5)  # as one filter


def test_the_landscape_of_a_quadratic_loss_is_its_parabola() -> None:
    model = nn.Linear(6, 4).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def score(model, batches):
        return {"loss": mse_loss(model(batches[0][0]), batches[0][1]).item()}

    found = landscape(model, [(x, y)], score, dimensions=2, points=3, seed=5)
    first, second = (filter_normalised_direction(model, seed)["weight"] for seed in (5, 6))
    for point in found.points:
        moved = model.weight + point.setting["x"] * first + point.setting["y"] * second
        expected = mse_loss(nn.functional.linear(x, moved, model.bias), y)
        assert point.scores["loss"] == pytest.approx(expected.item(), rel=1e-12)


def record(row, seed, scores, budget="3", higher=True):
    """A cell whose metric under weight noise of strength 0, 0.1, 0.2 is given, for two noise seeds a point apart."""
    points = [{"setting": {"kind": "none", "strength": 0.0, "seed": 0}, "scores": {"accuracy": scores[0]}}]
    points += [
        {"setting": {"kind": "weights", "strength": s, "seed": n}, "scores": {"accuracy": value - 0.5 + n}}
        for s, value in zip((0.1, 0.2), scores[1:], strict=True)
        for n in (0, 1)
    ]
    points.append({"setting": {"kind": "activations", "strength": 0.1, "seed": 0}, "scores": {"accuracy": 0.0}})
    return {
        "cell": {"row": row, "budget": budget, "seed": seed},
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": higher},
        "clean": {"accuracy": scores[0]},
        "perturbation": {"points": points},
    }


def test_losses_are_interpolated_where_the_mean_of_the_reference_has_lost_five() -> None:
    cells = [record("lsq", 0, (90, 88, 80)), record("lsq", 1, (90, 86, 78)), record("ours", 0, (91, 90, 88))]
    rows = curves.rows_of([*cells, record("float", 0, (92, 92, 92), budget=None), record("x", 0, (1, 1, 1), "4")], "3")
    assert list(rows) == ["float", "lsq", "ours"]
    assert curves.budgets(cells) == ["3"]
    found = curves.drops(rows, curves.perturbation_curve("weights"), "lsq", 5.0)
    assert found["strength"] == pytest.approx(0.125)  # mean losses 3 at 0.1 and 11 at 0.2
    assert found["lost"]["lsq"] == pytest.approx([4, 6])
    assert found["lost"]["ours"] == pytest.approx([1.5])
    assert found["lost"]["float"] == pytest.approx([0])


def test_a_reference_that_never_loses_so_much_sets_no_strength() -> None:
    rows = curves.rows_of([record("lsq", 0, (90, 89, 88))], "3")
    curve = curves.perturbation_curve("weights")
    assert curves.drops(rows, curve, "lsq", 5.0) == {"strength": None, "lost": {}}
    assert curves.drops(rows, curve, "absent", 5.0) == {"strength": None, "lost": {}}
    assert curves.drops(rows, curves.corruption_curve(), "lsq", 5.0) == {"strength": None, "lost": {}}


def test_where_lower_is_better_a_rise_is_a_loss() -> None:
    cell = record("lsq", 0, (1, 2, 4), higher=False)
    assert curves.lost(cell, curves.perturbation_curve("weights")(cell)) == {0.0: 0, 0.1: -1 * (1 - 2), 0.2: 3}


def test_interpolation_outside_what_was_measured_is_refused() -> None:
    assert curves.value_at({0: 1.0, 2: 5.0}, 0.5) == 2.0
    with pytest.raises(ValueError, match="from 0 to 2, found 3"):
        curves.value_at({0: 1.0, 2: 5.0}, 3)
    assert curves.mean_curve([{0: 1.0, 1: 2.0}, {0: 3.0}]) == {0: 2.0}
