from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments.tasks import super_resolution
from experiments.tasks.super_resolution import BORDER, PatchSplit, SuperResolution, centred, data, psnr
from nipq.errors import ConfigError
from nipq.train.batches import Sources
from nipq.train.config import DataConfig


@pytest.fixture(autouse=True)
def _every_third(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three photographs, one for each split; few patches."""
    monkeypatch.setattr(super_resolution, "EVERY", 3)
    monkeypatch.setattr(super_resolution, "TEST", 1)
    monkeypatch.setattr(super_resolution, "VALIDATION", 2)
    monkeypatch.setattr(super_resolution, "PATCHES", 12)


def section(folder: Path | None, **fields: object) -> DataConfig:
    settings = {"kind": "custom", "factory": "x:y", "path": folder and str(folder), "batch_size": 4}
    return DataConfig.model_validate(settings | fields)


def patches(sources: Sources) -> list[PatchSplit]:
    splits = [sources.train, sources.validation, sources.test]
    assert all(isinstance(split, PatchSplit) for split in splits)
    return splits  # type: ignore[return-value]


def test_each_photograph_gives_patches_to_one_split(folder: Path) -> None:
    for number in range(3):  # only this photograph has red in these bits
        path = folder / "set" / f"photo{number}.png"
        image = np.array(Image.open(path))
        image[..., 0] = image[..., 0] // 4 + 64 * number
        Image.fromarray(image).save(path)
    for split, number in zip(patches(data(section(folder), 0)), (0, 2, 1), strict=True):
        assert split.large.shape == (12, 3, 64, 64)
        assert split.small.shape == (12, 3, 32, 32)
        assert (split.large[:, 0] // 64 == number).all()


def test_a_small_patch_shows_the_place_of_its_large_one(folder: Path) -> None:
    smooth = np.indices((320, 448)).astype(np.float64)
    wave = 128 + 100 * np.sin(smooth[0] / 6) * np.cos(smooth[1] / 9)
    for number in range(3):
        image = Image.fromarray(np.repeat(wave[..., None], 3, -1).astype(np.uint8))
        image.save(folder / "set" / f"photo{number}.png")
    for split in patches(data(section(folder), 0)):
        means = nn.functional.avg_pool2d(split.large.float(), 2)
        assert (means - split.small).abs().max() < 4
        assert not split.large[0].equal(split.large[1])


def test_blur_is_left_out(folder: Path) -> None:
    path = folder / "set" / "photo0.png"
    image = np.array(Image.open(path))
    image[:, 128:] = 90
    Image.fromarray(image).save(path)
    assert len(patches(data(section(folder), 0))[0].small) == 2 * 5


def test_validation_patches_are_trained_on_when_nothing_is_held_out(folder: Path) -> None:
    sources = data(section(folder, validation=0.0), 0)
    assert sources.validation is None
    assert isinstance(sources.train, PatchSplit)
    assert len(sources.train.small) == 24


def test_training_crops_fit_each_other_and_depend_on_their_key_only(folder: Path) -> None:
    split = patches(data(section(folder), 0))[0]
    # With large patches that repeat the small ones' pixels, the crops must do so, too, however they are turned.
    doubled = PatchSplit(split.small, split.small.repeat_interleave(2, 2).repeat_interleave(2, 3), section(folder))
    for small, large in doubled.epoch(5):
        assert small.shape == (4, 3, 24, 24)
        assert torch.equal(small.repeat_interleave(2, 2).repeat_interleave(2, 3), large)
    whole, tail, other = list(split.epoch(5)), list(split.epoch(5, start=1)), list(split.epoch(6))
    assert len(whole) == len(split) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[1:], tail, strict=True))
    assert not torch.equal(whole[0][0], other[0][0])


def test_the_same_patches_each_time(folder: Path) -> None:
    first = patches(data(section(folder), 0))
    next(folder.glob("super_resolution-*.npz")).unlink()
    for mine, theirs in zip(first, patches(data(section(folder), 0)), strict=True):
        assert torch.equal(mine.large, theirs.large)
        assert torch.equal(mine.small, theirs.small)


def test_losses_are_mean_absolute_differences() -> None:
    outputs, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.75]])
    assert float(SuperResolution().loss(outputs, other)) == 0.375
    assert float(SuperResolution().distillation(outputs, other)) == 0.375


def test_psnr_of_one_level_of_gray_is_that_of_luma_s_range() -> None:
    truth = centred(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8))
    expected = 20 * math.log10(255 / (219 / 255))  # luma has 219 levels for 255 of the colours
    assert float(psnr(truth + 1 / 255, truth)) == pytest.approx(expected, abs=0.01)


def test_psnr_leaves_the_border_out_and_clips() -> None:
    truth = centred(torch.full((2, 3, 12, 12), 255, dtype=torch.uint8))
    outputs = truth + 3.0  # brighter than white
    outputs[:, :, :BORDER] = outputs[:, :, -BORDER:] = outputs[..., :BORDER] = outputs[..., -BORDER:] = -0.5
    outputs[:, :, 5, 5] = centred(torch.tensor(254.0))
    squares = (219 / 255) ** 2 / 64  # one of the 8 x 8 pixels inside is a level off
    assert psnr(outputs, truth).tolist() == pytest.approx([10 * math.log10(255**2 / squares)] * 2, abs=0.01)


def test_scores_are_means_over_patches_whatever_the_batches(folder: Path) -> None:
    sources = data(section(folder, eval_batch_size=5), 0)
    model = nn.Upsample(scale_factor=2, mode="bicubic").train()
    scores = SuperResolution().scores(model, sources.test)
    small, large = patches(sources)[2].small, patches(sources)[2].large
    outputs = model(centred(small))
    assert model.training
    assert scores["count"] == 12
    assert scores["psnr"] == pytest.approx(float(psnr(outputs, centred(large)).mean()), rel=1e-5)
    assert scores["loss"] == pytest.approx(float((outputs - centred(large)).abs().mean()), rel=1e-5)


def test_a_missing_folder_says_how_to_get_the_photographs() -> None:
    with pytest.raises(ConfigError, match=r"expected a folder of photographs .*apt-get"):
        data(section(None), 0)
