"""The data sets: their splits, their determinism, and what is said when files are missing."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nipq.errors import ConfigError
from nipq.functional.counter_rng import seed_of
from nipq.train.batches import Sources, Split, TensorSplit, tensor_splits
from nipq.train.config import DataConfig
from nipq.train.data import load_data


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, count, ending in (("train", 200, ".gz"), ("t10k", 40, "")):
        write_idx(tmp_path / "deep" / f"{stem}-images-idx3-ubyte{ending}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{ending}", np.arange(count) % 10)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path


def same(left: Split, right: Split, key: int, start: int = 0) -> bool:
    a, b = list(left.epoch(key))[start:], list(right.epoch(key, start))
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_digits_are_split_without_overlap() -> None:
    data = load_data(DataConfig(kind="digits"), seed=0)
    assert isinstance(data.train, TensorSplit)
    sizes = [sum(len(y) for _, y in split) for split in (data.train, data.validation, data.test) if split is not None]
    assert sum(sizes) == 1797
    assert sizes[2] == pytest.approx(360, abs=10)
    images = torch.cat([x for x, _ in data.train]).flatten()
    assert float(images.mean()) == pytest.approx(0, abs=0.02)
    assert float(images.std()) == pytest.approx(1, abs=0.02)


def test_the_test_split_does_not_depend_on_the_seed() -> None:
    first, second = (load_data(DataConfig(kind="digits"), seed=seed) for seed in (0, 1))
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(first.test, second.test, strict=True))


def test_no_validation_when_not_asked_for() -> None:
    assert load_data(DataConfig(kind="digits", validation=0.0), seed=0).validation is None


@pytest.mark.parametrize("start", [0, 3])
def test_epoch_depends_on_its_key_only(start: int) -> None:
    config = DataConfig(kind="digits", batch_size=100)
    first, second = (load_data(config, seed=0).train for _ in range(2))
    torch.manual_seed(start)
    assert same(first, second, key=5, start=start)
    assert not torch.equal(next(first.epoch(5))[0], next(first.epoch(6))[0])


def test_augmentation_moves_whole_images() -> None:
    images = torch.zeros(64, 1, 6, 6)
    images[:, :, 2:4, 2:4] = 1.0
    split = TensorSplit(images, torch.zeros(64, dtype=torch.int64), batch_size=64, eval_batch_size=64, shift=1)
    moved, _ = next(split.epoch(0))
    assert moved.sum(dim=(1, 2, 3)).tolist() == [4.0] * 64
    rows = moved.amax(dim=(1, 3)).argmax(dim=1)
    assert set(rows.tolist()) == {1, 2, 3}


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.arange(4.0).expand(400, 1, 4, 4)
    split = TensorSplit(images, torch.zeros(400, dtype=torch.int64), batch_size=400, eval_batch_size=400, flip=True)
    flipped = float((next(split.epoch(0))[0][:, 0, 0, 0] == 3.0).double().mean())
    assert flipped == pytest.approx(0.5, abs=5 * 0.5 / 400**0.5)


def test_fashion_mnist_is_found_in_subfolders(fashion: Path) -> None:
    data = load_data(DataConfig(kind="fashion_mnist", path=str(fashion), batch_size=32), seed=0)
    assert data.classes == 10
    assert next(iter(data.test))[0].shape == (40, 1, 28, 28)
    assert len(data.train) == 180 // 32
    assert all(x.shape == (32, 1, 28, 28) for x, _ in data.train.epoch(0))


def test_train_limit_keeps_that_many(fashion: Path) -> None:
    config = DataConfig(kind="fashion_mnist", path=str(fashion), batch_size=10, train_limit=50)
    assert sum(len(y) for _, y in load_data(config, seed=0).train) == 50


@pytest.mark.parametrize("path", [None, "absent"])
@pytest.mark.parametrize("kind", ["fashion_mnist", "image_folder"])
def test_missing_folder_says_how_to_get_the_data(kind: str, path: str | None, tmp_path: Path) -> None:
    config = DataConfig.model_validate({"kind": kind, "path": path and str(tmp_path / path)})
    with pytest.raises(ConfigError, match="dataset-fashion-mnist" if kind == "fashion_mnist" else "PATH/train/<class>"):
        load_data(config, seed=0)


def test_missing_file_is_named(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match="t10k-labels-idx1-ubyte"):
        load_data(DataConfig(kind="fashion_mnist", path=str(fashion)), seed=0)


def test_damaged_file_is_named(fashion: Path) -> None:
    path = fashion / "deep" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz"):
        load_data(DataConfig(kind="fashion_mnist", path=str(fashion)), seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder_does_not_depend_on_workers(workers: int, folder: Path) -> None:
    config = DataConfig(kind="image_folder", path=str(folder), image_size=32, batch_size=4, validation=0.2)
    alone = load_data(config, seed=0)
    helped = load_data(config.model_copy(update={"workers": workers}), seed=0)
    assert same(alone.train, helped.train, key=3)
    assert same(alone.train, helped.train, key=3, start=1)
    assert next(iter(alone.test))[0].shape == (4, 3, 32, 32)


def test_image_folder_smaller_than_a_batch_is_one_batch(folder: Path) -> None:
    data = load_data(DataConfig(kind="image_folder", path=str(folder), image_size=32, batch_size=256), seed=0)
    assert len(data.train) == 1
    assert len(next(data.train.epoch(0))[1]) == 11


def test_classes_must_agree(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(ConfigError, match="'dog', 'fox'"):
        load_data(DataConfig(kind="image_folder", path=str(folder)), seed=0)


def test_folder_without_images(folder: Path) -> None:
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="expected images in class folders"):
        load_data(DataConfig(kind="image_folder", path=str(folder)), seed=0)


def made(config: DataConfig, seed: int) -> Sources:
    """A custom data set: token ids with a mask, and whole numbers to tell."""
    count = config.kwargs.get("count", 50)
    ids = torch.arange(count)[:, None].expand(count, 3)
    train = ({"ids": ids, "mask": torch.ones(count, 3)}, torch.arange(count) % 2)
    return tensor_splits(train, train, config, seed, classes=2, augment=masked)


def masked(inputs: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return inputs | {"mask": torch.rand(inputs["mask"].shape, generator=generator)}


def custom(**settings: Any) -> DataConfig:
    return DataConfig(**{"kind": "custom", "factory": f"{__name__}:made", "batch_size": 8, **settings})


def test_custom_factory_gets_the_section_and_the_seed() -> None:
    data = load_data(custom(kwargs={"count": 40}, validation=0.25, train_limit=17), seed=3)
    assert data.validation is not None
    held_out = torch.cat([x["ids"][:, 0] for x, _ in data.validation])
    kept = torch.cat([x["ids"][:, 0] for x, _ in data.train])
    assert (len(held_out), len(kept), data.classes) == (10, 17, 2)
    assert not set(held_out.tolist()) & set(kept.tolist())
    assert int((held_out % 2).sum()) == 5  # as many of each class


def test_mappings_are_cut_together_and_augmented_by_the_key() -> None:
    train = load_data(custom(), seed=0).train
    first, again, other = (next(train.epoch(key)) for key in (1, 1, 2))
    assert all(torch.equal(first[0][name], again[0][name]) for name in ("ids", "mask"))
    assert not torch.equal(first[0]["mask"], other[0]["mask"])
    assert torch.equal(first[0]["ids"][:, 0] % 2, first[1])
    assert all(bool((x["mask"] == 1).all()) for x, _ in train)  # evaluation sees it as it is
    plain = load_data(custom(augment=False), seed=0).train
    assert torch.equal(next(plain.epoch(1))[0]["mask"], torch.ones(8, 3))


@pytest.mark.parametrize("targets", [None, torch.randn(20, 2)])
def test_targets_that_are_no_classes_are_held_out_at_random(targets: torch.Tensor | None) -> None:
    inputs = torch.arange(20.0)[:, None]
    data = tensor_splits((inputs, targets), (inputs, targets), custom(validation=0.3), seed=1)
    assert data.validation is not None
    sizes = [sum(len(x) for x, _ in split) for split in (data.train, data.validation, data.test)]
    assert sizes == [14, 6, 20]
    x, y = next(data.train.epoch(0))
    assert y is None if targets is None else torch.equal(y, targets[x[:, 0].long()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "no_such_package:data"}, r"no data\.factory 'no_such_package:data'"),
        ({"factory": "nipq.train.batches:seed_of"}, "must return Sources, it gave int"),
    ],
)
def test_custom_factory_that_is_none(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(custom(**settings), seed=0)


@pytest.mark.parametrize("settings", [{"kind": "custom"}, {"kind": "digits", "factory": "a:b"}])
def test_factory_belongs_to_custom(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected a factory with kind custom and only there"):
        DataConfig.model_validate(settings)


def test_seeds_differ_by_part_and_place() -> None:
    seeds = {seed_of(run, stage, epoch) for run in range(5) for stage in ("float", "search") for epoch in range(20)}
    assert len(seeds) == 5 * 2 * 20
    assert seed_of(1, 12) != seed_of(11, 2)


def test_seeds_stay_the_same_between_versions() -> None:
    assert seed_of(0, "search", 1) == 182309332035303724
