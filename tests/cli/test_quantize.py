"""``nipq quantize`` on a folder of small images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import nipq
from nipq.cli.app import app
from nipq.cli.quantize import ImageBatches, find_images, load_network, parse_budget
from nipq.errors import ConfigError

FACTORY = f"{__name__}:small"


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for name in ("cats", "dogs/small"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_folder_quantizes_a_factory_and_writes_both_files(folder: Path, tmp_path: Path) -> None:
    packed, exported = tmp_path / "model.nipq.safetensors", tmp_path / "model.npz"
    arguments = (FACTORY, "--data", folder, "--bits", "4/8", "--image-size", 16, "--output", packed)
    code, text = call(*arguments, "--export", exported)
    assert code == 0, text
    assert "average bits: 4.00 for weights" in text
    assert f"wrote {packed}" in text
    assert exported.is_file()
    nipq.load(packed, small())
    code, text = call(*arguments)
    assert code == 1
    assert "expected a name that is free" in " ".join(text.split())
    code, text = call(*arguments, "--overwrite", "--json")
    assert code == 0
    answer = json.loads(text)
    assert answer["ok"]
    assert answer["report"]["file_bytes"] == packed.stat().st_size
    assert answer["report"]["fit_samples"] + answer["report"]["held_out_samples"] == 12


def test_training_by_labels_and_without(folder: Path) -> None:
    for more in ((), ("--labels",)):
        arguments = (FACTORY, "--data", folder, "--bits", "3", "--image-size", 16, "--epochs", 1, "--json")
        code, text = call(*arguments, *more)
        assert code == 0, text
        last = json.loads(text)["report"]["stages"][-1]
        assert last["name"] == "training"
        assert last["note"] == ("1 epoch by loss_fn" if more else "1 epoch towards float")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "four"), "expected WEIGHTS/ACTIVATIONS such as 4/8, found 'four'"),
        ((), "expected a budget, found none"),
        (("--bits", "1/8"), "expected average weight bits within 2 to 8"),
        (("--size", "1.2 XB"), "ModelSize: expected a number above 0"),
    ],
)
def test_a_bad_budget_is_refused(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, text = call(FACTORY, "--data", folder, "--image-size", 16, *arguments)
    assert code == 1
    assert message in " ".join(text.split())


def test_budgets_are_joined() -> None:
    assert repr(parse_budget("4.5", None, "5 G")) == (
        "AverageBits(weights=4.5, activations=4.5, mode='bound') & BitOps(operations='5 G', mode='bound')"
    )


def test_images_are_found_and_read_in_a_fixed_order(folder: Path) -> None:
    images = find_images(folder)
    assert len(images) == 12
    _, transform = load_network(FACTORY, None, 16)
    loader = ImageBatches(images, transform)
    assert len(loader) == 1
    first, second = (torch.cat(list(loader)) for _ in range(2))
    assert first.shape == (12, 3, 16, 16)
    assert torch.equal(first, second)
    labelled = ImageBatches(images, transform, list(range(12)))
    ((inputs, places),) = list(labelled)
    assert torch.equal(inputs, first)
    assert sorted(places.tolist()) == list(range(12))
    assert torch.equal(inputs[0], labelled.load(images[places[0]]))
    with pytest.raises(ConfigError, match=r"expected a folder of images .* found no images"):
        find_images(_empty(folder))
    with pytest.raises(ConfigError, match="found no such folder"):
        find_images(folder / "missing")
    (folder / "cats" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"broken\.png: expected an image"):
        list(ImageBatches(find_images(folder), transform))


def _empty(folder: Path) -> Path:
    place = folder / "empty"
    place.mkdir()
    return place


def test_labels_have_to_fit_the_model(folder: Path) -> None:
    arguments = (FACTORY, "--data", folder, "--bits", 4, "--image-size", 16, "--epochs", 1, "--labels")
    (folder / "birds").mkdir()
    (folder / "cats" / "0.png").rename(folder / "birds" / "0.png")
    code, text = call(*arguments)
    assert code == 1
    assert "expected as many subfolders as the model has classes, found 3 for outputs [1, 2]" in " ".join(text.split())
    (folder / "birds" / "0.png").rename(folder / "0.png")
    code, text = call(*arguments)
    assert code == 1
    assert "expected every image in a subfolder" in " ".join(text.split())


def test_networks_come_with_their_own_preprocessing(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    file = tmp_path / "weights.safetensors"
    save_file(torchvision.models.squeezenet1_1().state_dict(), file)
    image = Image.new("RGB", (300, 260), (255, 0, 0))
    model, transform = load_network("squeezenet1_1", file, 64)
    assert not model.training
    assert transform(image).shape == (3, 224, 224)
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_vit").state_dict(), file)
    _, transform = load_network("test_vit", file, 64)
    assert transform(image).shape == (3, 160, 160)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="expected weights of test_vit, found others"):
        load_network("test_vit", file, 64)
    with pytest.raises(ConfigError, match="no torchvision model 'resnet1800'"):
        load_network("resnet1800", None, 64)
