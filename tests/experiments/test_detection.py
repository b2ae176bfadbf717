from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.tasks import centernet, detection
from experiments.tasks.centernet import CenterNet, doubled, halved, main, published
from experiments.tasks.detection import BOXES, Detection, compose, cutouts, data, distance, others, plain, task
from nipq.errors import ConfigError
from nipq.prepare.validate import validate
from nipq.train.batches import TensorSplit
from nipq.train.config import DataConfig, ModelConfig, TrainConfig
from nipq.train.pipeline import run


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


def section(folder: Path | None, **fields: object) -> DataConfig:
    settings = {"kind": "custom", "factory": "x:y", "path": folder and str(folder), "image_size": 64, "batch_size": 4}
    return DataConfig.model_validate(settings | fields)


def test_tiles_to_learn_on_and_scenes_to_score_on(scenery: Path) -> None:
    sources = data(section(scenery), 0)
    splits = (sources.train, sources.validation, sources.test)
    assert all(isinstance(split, TensorSplit) for split in splits)
    # Two rows of two tiles from each of the two photographs that are not plain, made 128 pixels high.
    assert [(tuple(split.inputs.shape), split.inputs.dtype) for split in splits] == [
        ((count, 3, 64, 64), torch.uint8) for count in (8, 4, 6)
    ]
    assert sources.train.targets is None
    assert sources.test.targets["boxes"].shape == (6, 3, 4)
    assert data(section(scenery, validation=0.0, train_limit=3), 0).train.count == 3
    assert data(section(scenery, validation=0.0), 0).validation is None


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


def test_the_list_names_each_cut_out_once_with_a_class_of_coco() -> None:
    lines = [line for line in detection.CUTOUTS.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    names, labels = zip(*(line.split(": ") for line in lines), strict=True)
    assert len(set(names)) == len(lines) == 59
    assert all(0 <= int(label) < 80 for label in labels)


@pytest.mark.parametrize("break_it", ["no folder", "no cut-out"])
def test_missing_cut_outs_are_told_with_how_to_get_them(scenery: Path, break_it: str) -> None:
    next(scenery.rglob("dog.png")).unlink()
    with pytest.raises(ConfigError, match=r"expected 2 cut-outs .*animals/.*tuxpaint-stamps-default"):
        cutouts(None if break_it == "no folder" else scenery)


def test_a_size_that_the_network_cannot_halve_is_refused(scenery: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a multiple of 32 as data.image_size, found 100; 384"):
        data(section(scenery, image_size=100), 0)


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


def test_the_float_network_must_have_weights() -> None:
    weights = SimpleNamespace(weights="published")
    assert task(SimpleNamespace(model=None, teacher=weights))._section is weights
    with pytest.raises(ConfigError, match=r"expected the float network's weights .*centernet.*human-models"):
        task(SimpleNamespace(model=SimpleNamespace(weights=None), teacher=None))


def test_sizes_double_through_means_of_neighbours() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 9.0]])[None, None]
    expected = [[1, 2, 3, 3], [3, 4.5, 6, 6], [5, 7, 9, 9], [5, 7, 9, 9]]
    assert doubled(x)[0, 0].tolist() == expected


@pytest.mark.parametrize("kernel", [3, 5])
def test_stride_two_pads_as_tensorflow_does(kernel: int) -> None:
    layer, x = halved(nn.Conv2d(1, 1, kernel, 2, bias=False)).requires_grad_(False), torch.zeros(1, 1, 8, 8)
    # TensorFlow pads kernel - 2 in all, the smaller half first: the first window's last column is kernel - 1 - pad.
    pad = (kernel - 2) // 2
    x[0, 0, 2, 3 - pad] = 1.0
    weight = layer[1].weight[0, 0]
    out = layer(x)[0, 0]
    assert out.shape == (4, 4)
    for row, column in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        at = (2 + pad - 2 * row, 3 - 2 * column)
        inside = all(0 <= place < kernel for place in at)
        assert float(out[row, column]) == (float(weight[at]) if inside else 0.0)


def graph_of(model: CenterNet, folder: Path) -> Path:
    """A graph of TensorFlow.js with the weights of a network, as the package has it."""

    def nodes() -> Iterator[tuple[str, nn.Conv2d]]:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d):
                scope = name
                for pattern, replacement in centernet.RENAMES:
                    scope = re.sub(pattern, replacement, scope)
                yield scope, layer

    entries, topology, raw = [], [], b""
    for scope, layer in reversed(list(nodes())):
        weight = layer.weight.detach().permute((2, 3, 1, 0) if layer.groups == 1 else (2, 3, 0, 1))
        inputs = ["x"]
        for kind, tensor in (("weights", weight), ("bias", layer.bias)):
            if tensor is not None:
                entries.append({"name": f"{scope}/{kind}", "shape": list(tensor.shape), "dtype": "float32"})
                entries[-1]["quantization"] = {"dtype": "float16"}
                raw += tensor.detach().half().numpy().tobytes()
                inputs.append(f"{scope}/{kind}")
        topology.append({"name": f"tower_0/{scope}/BiasAdd", "op": "_FusedConv2D", "input": inputs})
    file = folder / centernet.GRAPH
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".bin").write_bytes(raw)
    manifest = [{"paths": ["centernet.bin"], "weights": entries}]
    file.write_text(json.dumps({"modelTopology": {"node": topology}, "weightsManifest": manifest}), encoding="utf-8")
    return file


def test_the_command_writes_the_graph_s_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path), str(tmp_path / "runs" / "weights.safetensors")])
    with pytest.raises(SystemExit, match=r"expected models/centernet.json .*human-models"):
        main()
    model, other = CenterNet(), CenterNet()
    graph_of(model, tmp_path / "package")
    main()
    other.load_state_dict(load_file(tmp_path / "runs" / "weights.safetensors"), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.half().float()), name


def test_every_layer_has_a_name_of_its_own_in_the_graph(tmp_path: Path) -> None:
    graph = json.loads(graph_of(CenterNet(), tmp_path).read_text(encoding="utf-8"))
    names = [node["name"] for node in graph["modelTopology"]["node"]]
    assert len(set(names)) == len(names) == 89
    for name in (
        "MobilenetV3/Conv",
        "MobilenetV3/expanded_conv_10/squeeze_excite/Conv_1",
        "CenternetHead/c2_reverse/3x3",
    ):
        assert f"tower_0/{name}/BiasAdd" in names


def test_a_graph_of_another_network_is_refused(tmp_path: Path) -> None:
    file = graph_of(CenterNet(classes=7), tmp_path)
    with pytest.raises(ConfigError, match=r"weights of heat.pointwise as CenternetHead/centernet_cls_output .*none"):
        published(file, CenterNet())
    file.write_text(file.read_text(encoding="utf-8").replace("extern1", "extern2"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"weights of last.0 as extern1 .*human-models"):
        published(file, CenterNet(classes=7))


def test_the_network_answers_at_a_quarter_of_the_size_and_can_be_prepared_whole() -> None:
    model, images = CenterNet().eval(), torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    heat, sides = model(images)
    assert heat.shape == (1, 80, 16, 24)
    assert sides.shape == (1, 4, 16, 24)
    assert sum(block.residual for block in model.blocks) == 10
    findings = validate(model, images)
    assert {finding.severity for finding in findings} == {"float"}
    assert not [finding for finding in findings if "no quantized form" in finding.reason]


def test_a_run_learns_from_tiles_and_proves_its_model(
    scenery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nipq.train.pipeline._plots", lambda *_: None)  # they would take most of the time
    save_file(CenterNet().state_dict(), tmp_path / "float.safetensors")
    network = {
        "factory": "experiments.tasks.centernet:CenterNet",
        "weights": str(tmp_path / "float.safetensors"),
    }
    config = {
        "task": "experiments.tasks.detection:task",
        "model": network,
        "teacher": network,
        "data": section(scenery, factory="experiments.tasks.detection:data", eval_batch_size=2).to_dict(),
        "budget": {"average_bits": {"weights": 5, "activations": 5}},
        "quantization": {"init": "max", "granularity": "channel"},
        "stages": {"search": {"epochs": 1}, "finetune": {"epochs": 1}},
        "calibration_batches": 1,
        "verify_batches": 1,
        "threads": 1,
    }
    results = run(TrainConfig.model_validate(config), tmp_path / "run", quiet=True)
    assert results["verified"]
    assert results["average_bits"]["weights"] <= 5
    assert results["metric"] == {"name": "mAP50", "unit": "%", "higher_is_better": True}
    assert results["states"]["finetuned"]["test"].keys() == {"loss", "mAP50", "count"}
