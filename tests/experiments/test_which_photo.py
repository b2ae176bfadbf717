from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.tasks import which_photo
from experiments.tasks.which_photo import strips
from nipq.train.batches import Sources, TensorSplit
from nipq.train.config import DataConfig


@pytest.fixture(autouse=True)
def _few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_photo, "CROPS", (40, 8))


def load(folder: Path, **fields: object) -> Sources:
    settings = {"kind": "custom", "factory": "experiments.tasks.which_photo:data", "path": str(folder)} | fields
    return which_photo.data(DataConfig.model_validate(settings), 0)


def tensors(split: object) -> tuple[Tensor, Tensor]:
    assert isinstance(split, TensorSplit)
    return split.inputs, split.targets


def colours(images: Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()))


def test_no_pixel_is_in_two_splits(folder: Path) -> None:
    for name in ("photo1.png", "photo2.png"):
        (folder / "set" / name).write_bytes((folder / "set" / "photo0.png").read_bytes())
    sources = load(folder, validation=0.2)
    train, validation, test = (
        colours(tensors(split)[0]) for split in (sources.train, sources.validation, sources.test)
    )
    assert min(len(train), len(validation), len(test)) > 1000
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_strips_hold_out_the_right_end_and_drop_what_reaches_into_it() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    lefts = torch.tensor([0, 67, 68, 99, 100, 7, 300])
    held_out, train = strips(labels, lefts, 0.25)
    # The edges are column 99 of photograph 0 and column 226.75 of photograph 1.
    assert held_out.tolist() == [3, 4, 6]
    assert train.tolist() == [0, 1, 5]
    held_out, train = strips(labels, lefts, 0.0)
    assert len(held_out) == 0
    assert len(train) == 7
