"""A small net, trained for a moment, with most of what a deployed layer can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, hardswish, relu

from nipq.config import Config, Rule
from nipq.export.api import export
from nipq.export.packed_write import save
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

CLASSES = 4


class Net(nn.Module):
    """conv-bn-relu, a depthwise residual, hard-swish (a zero point), two layers of one shape, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 1)
        self.two = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem_bn(self.stem(x)))
        x = relu(x + self.depthwise_bn(self.depthwise(x)))
        x = hardswish(self.one(x))
        x = relu(self.two(x))
        return self.head(x.mean((2, 3)))


def batches(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Bumps in one of four corners: a task that is learned in a few steps."""
    labels = torch.arange(count) % CLASSES
    images = 0.5 * torch.randn(count, 2, 6, 6)
    for corner in range(CLASSES):
        rows, columns = slice(3 * (corner // 2), 3 * (corner // 2) + 3), slice(3 * (corner % 2), 3 * (corner % 2) + 3)
        images[labels == corner, 0, rows, columns] += 1.5
        images[labels == corner, 1] += corner
    return [(images, labels)]


def made(config: Config | None = None, bits: tuple[int, ...] = (4, 6, 3, 5)) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, data = Net(), batches()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    rules = (Rule("two", grid="shifted"),)
    prepare_(model, data[0][0], config or Config(granularity="channel", rules=rules))
    calibrate_(model, data)
    for i, quantizer in enumerate(quantizers(model)):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(bits[i % len(bits)])
    return model.eval(), data


@pytest.fixture
def net() -> nn.Module:
    """A float ``Net``."""
    return Net()


@pytest.fixture(name="made")
def _made() -> Callable[..., tuple[nn.Module, list[Any]]]:
    """Makes a trained, prepared ``Net`` with frozen bits, and its data."""
    return made


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Module, list[Any]]:
    """One of them for all tests; not to be changed."""
    return made()


@pytest.fixture(scope="session")
def exported(trained: tuple[nn.Module, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained net in every format, by the end of the file's name; not to be changed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, data = trained
    folder, deployed = tmp_path_factory.mktemp("exported"), convert(model)
    paths = {end: folder / f"model{end}" for end in (".nipq.safetensors", ".onnx", ".qonnx.onnx", ".npz", ".pt2")}
    save(deployed, paths[".nipq.safetensors"])
    for end, path in paths.items():
        if end != ".nipq.safetensors":
            export(deployed, path, data[0][0][:3])
    paths["packed.onnx"] = folder / "packed.onnx"
    export(deployed, paths["packed.onnx"], data[0][0][:3], pack=True)
    return paths
