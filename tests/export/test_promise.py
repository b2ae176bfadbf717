"""What ``promised_bytes`` says before training is what lies on the disk after it, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nipq.config import Config, Rule
from nipq.errors import OrderError
from nipq.export.api import export
from nipq.export.onnx_read import KEY
from nipq.export.onnx_write import promised_bytes
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import quantizers, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Every grid, a fresh layer norm and a bias of zeros, which an exporter would merge with others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.first, self.second, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 4)
        for layer in (self.left, self.right):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.stem(x)))
        x = self.left(x) + torch.relu(self.right(x))
        return self.head(self.second(self.first(x.mean((2, 3)))))


def prepared() -> nn.Module:
    torch.manual_seed(0)
    rules = (Rule("right", grid="shifted"), Rule("head", activation_bits=(2, 16), weight_bits=(2, 16)))
    return calibrate_(prepare_(Net(), X, Config(granularity="channel", rules=rules)), [X])


def trained(model: nn.Module) -> nn.Module:
    """Every number moved, boundaries and statistics included; zero points end elsewhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.train()(X)
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(quantizer.bits_rounded)
    return model.eval()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn=st.lists(st.integers(2, 8), min_size=6, max_size=6), wide=st.integers(2, 16), pack=st.booleans())
def test_a_promise_before_training_is_kept(tmp_path_factory: Any, drawn: list[int], wide: int, pack: bool) -> None:
    model, folder = prepared(), tmp_path_factory.mktemp("promise")
    names = {"stem": {"weights": drawn[0]}, "head": {"weights": wide, "activations": 18 - wide}}
    names |= {n: {"weights": drawn[k], "activations": drawn[k + 1]} for n, k in (("left", 1), ("right", 3))}
    set_bits_(model, names)
    promised = promised_bytes(model, X, pack=pack)
    report = export(convert(trained(model)), folder / "model.onnx", X, pack=pack)
    assert promised == report.bytes == report.path.stat().st_size


def test_a_promise_of_qonnx_is_kept(tmp_path: Path) -> None:
    model = prepared()
    set_bits_(model, 5)
    promised = promised_bytes(model, X, format="qonnx")
    assert export(convert(trained(model)), tmp_path / "model.qonnx.onnx", X).path.stat().st_size == promised


@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    drawn=st.lists(
        st.tuples(
            st.integers(2, 16),
            st.one_of(st.none(), st.integers(2, 16)),
            st.sampled_from(["signed", "unsigned", "shifted"]),
            st.sampled_from([1, 2]),
        ),
        min_size=7,
        max_size=7,
    )
)
def test_a_deployed_model_promises_its_own_file(zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any]) -> None:
    model = zoo.deployed([zoo.numbers(*numbers) for numbers in drawn])
    for tensor in (*model.norms.parameters(), *model.norms.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)  # fresh ones are equal, and equal ones are stored once
    path = tmp_path_factory.mktemp("promise") / "zoo.onnx"
    promised = promised_bytes(model, zoo.inputs(1))
    assert promised == export(model, path, zoo.inputs(2)).bytes == path.stat().st_size


def test_equal_numbers_and_zero_points_change_no_size(zoo: SimpleNamespace, tmp_path: Path) -> None:
    """Tensors that are equal by chance are not merged, and the metadata are as long for every zero point."""
    x = torch.randn(2, 4, 6, 5)
    model = nn.Sequential(
        *(zoo.alone(nn.Conv2d(4, 4, 1), zoo.numbers(4, 7, "shifted"))[0] for _ in range(2)),
    ).requires_grad_(False)
    sizes = set()
    for zero_point in (0, 127):
        for layer in model:
            layer.zero_point, layer.code_low, layer.code_high = zero_point, -zero_point, 127 - zero_point
        model[1].offset.copy_(model[0].offset)
        model[1].scale.copy_(model[0].scale)
        report = export(model, tmp_path / f"{zero_point}.onnx", x)
        sizes.add(report.bytes)
        (text,) = (entry.value for entry in onnx.load(report.path).metadata_props if entry.key == KEY)
        assert json.loads(text)["layers"][0]["zero_point"] == zero_point
    assert len(sizes) == 1
    assert promised_bytes(model, x) in sizes


def test_the_model_is_not_changed() -> None:
    model = prepared()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    promised_bytes(model, X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_grids_have_to_be_known() -> None:
    with pytest.raises(OrderError, match=r"stem\.input: expected a calibrated clipping range.*chooses the grids"):
        promised_bytes(prepare_(Net(), X), X)
    with pytest.raises(OrderError, match="expected a prepared model"):
        promised_bytes(nn.Linear(2, 2), torch.zeros(1, 2))
