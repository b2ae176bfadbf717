from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.tasks import which_photo
from experiments.tasks.which_photo import strips
from nipq.errors import ConfigError
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


def test_each_photograph_is_a_class_with_its_crops(folder: Path) -> None:
    sources = load(folder, validation=0.0)
    assert sources.classes == 3
    assert sources.validation is None
    for split, count in ((sources.train, 40), (sources.test, 8)):
        images, labels = tensors(split)
        assert images.shape == (3 * count, 3, 32, 32)
        assert labels.bincount().tolist() == [count] * 3
    images = tensors(sources.train)[0]
    assert images.mean().abs() < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


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


def test_a_photograph_without_texture_on_one_side_is_left_out(folder: Path) -> None:
    path = folder / "set" / "photo1.png"
    photo = np.array(Image.open(path))
    photo[:, 300:] = 128
    Image.fromarray(photo).save(path)
    sources = load(folder)
    assert sources.classes == 2
    assert tensors(sources.test)[1].unique().tolist() == [0, 1]


def test_the_same_crops_each_time_from_the_photographs_and_from_the_cache(folder: Path) -> None:
    first = load(folder)
    (cache,) = folder.glob("which_photo-*.npz")
    again = load(folder)
    cache.unlink()
    afresh = load(folder)
    for other in (again, afresh):
        for name in ("train", "validation", "test"):
            for mine, theirs in zip(tensors(getattr(first, name)), tensors(getattr(other, name)), strict=True):
                assert torch.equal(mine, theirs)


def test_the_seed_chooses_which_crops_a_limit_keeps(folder: Path) -> None:
    config = DataConfig.model_validate({"kind": "custom", "factory": "x:y", "path": str(folder), "train_limit": 30})
    few = [tensors(which_photo.data(config, seed).train)[0] for seed in (0, 0, 1)]
    assert len(few[0]) == 30
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])


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


def test_a_missing_folder_says_how_to_get_the_photographs() -> None:
    with pytest.raises(ConfigError, match="expected a folder of photographs"):
        load(Path("nowhere"))
