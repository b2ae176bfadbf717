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
