from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from experiments.tasks import detection
from experiments.tasks.detection import BOXES, Detection, compose, cutouts, distance, others, plain
from nipq.train.config import ModelConfig


@pytest.fixture
def scenery(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photographs, the first of them plain, and cut-outs of two classes beside them."""
    place = folder / "usr" / "stamps" / "animals"
    place.mkdir(parents=True)
    for name, colour in (("cow", (255, 0, 255)), ("dog", (0, 255, 255))):
        image = np.zeros((60, 90, 4), np.uint8)
        image[20:40, 30:70] = (*colour, 255)
        Image.fromarray(image).save(place / f"{name}.png")
    listed = tmp_path / "coco.txt"
    listed.write_text("# made up\nanimals/cow: 19\nanimals/dog: 16\n", encoding="utf-8")
    monkeypatch.setattr(detection, "CUTOUTS", listed)
    monkeypatch.setattr(detection, "PLAIN", ("photo0",))
    monkeypatch.setattr(detection, "SCENES", (4, 6))
    return folder


def test_a_box_is_where_its_cut_out_is(scenery: Path) -> None:
    dark = np.zeros((320, 448, 3), np.uint8)
    path = scenery / "set" / "photo0.png"
    Image.fromarray(dark).save(path)
    scenes = compose([path], cutouts(scenery), 128)
    counts = set()
    for image, boxes, classes in zip(scenes["images"], scenes["boxes"], scenes["classes"], strict=True):
        painted = np.zeros((128, 128), bool)
        for (left, upper, right, lower), label in zip(boxes[classes >= 0].astype(int), classes, strict=False):
            inside = image[:, upper:lower, left:right]
            assert np.unique(inside.reshape(3, -1), axis=1).T.tolist() == [
                [0, 255, 255] if label == 16 else [255, 0, 255]
            ]
            assert 0.24 * 128 <= right - left <= 0.56 * 128
            assert not painted[upper:lower, left:right].any()
            painted[upper:lower, left:right] = True
        assert not image[:, ~painted].any()
        counts.add(int((classes >= 0).sum()))
    assert counts <= {1, 2, 3}
    assert len(counts) > 1


def test_nobody_trains_on_the_photographs_of_scenes() -> None:
    listed = (detection.CUTOUTS.with_name("photographs.txt")).read_text(encoding="utf-8").splitlines()
    photos = [Path("/folder") / line for line in listed if line and line[0] != "#"]
    assert len(plain(photos)) == len(detection.PLAIN) == 13
    assert sorted(plain(photos) + others(photos)) == sorted(photos)


def test_the_distance_in_closed_form() -> None:
    answers = torch.tensor([0.0, math.log(3.0)]).reshape(1, 1, 1, 2), torch.zeros(1, 4, 1, 2)
    assert float(distance(answers, answers)) == 0.0
    heat = torch.zeros(1, 1, 1, 2, requires_grad=True)
    sides = torch.tensor([8.0, 0.0]).expand(1, 4, 1, 2)
    # Heat 1/2 and 3/4 against 1/2 and 1/2; sides are two strides apart where the heat is 1/2, of 5/4 in all.
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = distance((heat, sides), answers)
    assert found.item() == pytest.approx((divergence + BOXES * 0.5 * 2) / 1.25)
    (slope,) = torch.autograd.grad(found, heat)
    assert slope.flatten().tolist() == pytest.approx([0.0, (0.5 - 0.75) / 1.25])


class Sees(nn.Module):
    """One sure object of class 1 in the middle of every image, with a box of 8 x 8 pixels around it, moved right."""

    def __init__(self, moved: float = 0.0) -> None:
        super().__init__()
        self.moved = nn.Parameter(torch.tensor(moved))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        heat = torch.full((len(images), 2, 8, 8), -9.0)
        heat[:, 1, 4, 4] = 5.0
        sides = torch.stack([4 - self.moved, torch.tensor(4.0), 4 + self.moved, torch.tensor(4.0)])
        return heat, sides[None, :, None, None].expand(len(images), 4, 8, 8)


def test_scores_of_the_float_network_and_of_one_that_misses() -> None:
    boxes = torch.zeros(3, 3, 4)
    boxes[:, 1] = torch.tensor([12.0, 12.0, 20.0, 20.0])
    classes = torch.tensor([[-1, 1, -1]] * 3)
    images = torch.zeros(3, 3, 32, 32)
    batches = [
        (images[:2], {"boxes": boxes[:2], "classes": classes[:2]}),
        (images[2:], {"boxes": boxes[2:], "classes": classes[2:]}),
    ]
    judge = Detection(ModelConfig(factory="x:y", weights="none"))
    judge._network = Sees()
    assert judge.scores(Sees(), iter(batches)) == {"loss": 0.0, "mAP50": 100.0, "count": 3}
    missed = judge.scores(Sees(moved=4.0), batches)  # overlaps by a third
    assert missed["mAP50"] == 0.0
    assert missed["loss"] == pytest.approx(BOXES * 2 * 4 / (4 * 4), rel=1e-5)
    assert float(judge.loss(Sees()(images), None)) == 0.0
    assert judge.distillation(Sees()(images), Sees()(images)).item() == 0.0
