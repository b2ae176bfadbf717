"""Each corruption does what it says, more of it at each severity, the same for the same seed."""

from __future__ import annotations

import json

import pytest
import torch

from nipq.analysis.corruption import CORRUPTIONS, Corrupted, corrupt, corruption_sweep, value_range
from nipq.errors import ConfigError

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


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_in_range_and_get_worse_with_severity(name, images) -> None:
    before = images.clone()
    distances = []
    for severity in range(1, 6):
        changed = worse(images, name, severity)
        assert changed.shape == images.shape
        assert changed.dtype == images.dtype
        assert float(changed.min()) >= BLACK - 1e-5
        assert float(changed.max()) <= WHITE + 1e-5
        distances.append(float((changed - images).square().mean()))
    assert distances[0] > 1e-5
    assert distances == sorted(distances)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_where_there_is_chance(name, images) -> None:
    first, again, other = (worse(images, name, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    random = name in ("gaussian_noise", "impulse_noise", "occlusion")
    assert torch.equal(first, other) != random


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


def test_corrupted_batches_are_the_same_every_time_and_differ_from_each_other(images) -> None:
    labels = torch.arange(6)
    read = Corrupted([(images, labels), (images, labels)], "gaussian_noise", 2, BLACK, WHITE, seed=4)
    first, again = list(read), list(read)
    assert all(torch.equal(a[0], b[0]) and a[1] is labels for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    low, high = value_range([(images, labels), (3 * images, labels)])
    assert (low, high) == (float((3 * images).min()), float((3 * images).max()))


def test_a_sweep_starts_with_the_clean_images_and_is_plain_data(quantized, batches, score, unchanged) -> None:
    names, severities = ("blur", "contrast"), (1, 5)
    with unchanged(quantized):
        found = corruption_sweep(
            quantized, batches, score, black=-3, white=3, names=names, severities=severities, seed=2
        ).to_dict()
    assert json.loads(json.dumps(found)) == found | {"points": list(found["points"])}
    settings = [tuple(point["setting"].values()) for point in found["points"]]
    assert settings == [("none", 0, 2), *[(name, severity, 2) for name in names for severity in severities]]
    assert found["points"][0]["scores"] == score(quantized, batches)


@pytest.mark.parametrize(
    ("name", "severity", "ends", "message"),
    [
        ("fog", 1, (0, 1), "expected one of gaussian_noise, .*, found 'fog'"),
        ("blur", 0, (0, 1), "severity from 1 to 5, found 0"),
        ("blur", 6, (0, 1), "severity from 1 to 5, found 6"),
        ("blur", 1, (1, 1), "white above black, found 1 and 1"),
    ],
)
def test_what_is_unknown_is_refused(name, severity, ends, message) -> None:
    with pytest.raises(ConfigError, match=message):
        corrupt(torch.zeros(1, 1, 4, 4), name, severity, black=ends[0], white=ends[1])
