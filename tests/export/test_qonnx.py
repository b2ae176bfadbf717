"""QONNX files: its own executor computes the same, and its own accounting finds our bits and bit-operations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nipq.export.api import export
from nipq.nn.deployed import deployed_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
wrapper = pytest.importorskip("qonnx.core.modelwrapper")
execution = pytest.importorskip("qonnx.core.onnx_exec")
cleanup = pytest.importorskip("qonnx.util.cleanup")
accounting = pytest.importorskip("qonnx.util.inference_cost")

NUMBERS = (
    (3, 5, "unsigned", 1), (2, 9, "signed", 1), (7, 4, "signed", 2), (16, 16, "unsigned", 1),
    (5, 6, "shifted", 2), (4, 3, "unsigned", 1), (6, None, "unsigned", 1),
)  # fmt: skip


def opened(path: Path) -> Any:
    """As the package wants it: every batch is one, shapes and data types are inferred."""
    file = onnx.load(path)
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del file.graph.value_info[:]
    return cleanup.cleanup_model(wrapper.ModelWrapper(file))


@pytest.fixture
def zoo_model(zoo: SimpleNamespace) -> nn.Module:
    return zoo.deployed([zoo.numbers(*numbers) for numbers in NUMBERS])


def test_the_package_computes_the_same(zoo: SimpleNamespace, zoo_model: nn.Module, tmp_path: Path) -> None:
    report = export(zoo_model, tmp_path / "zoo.qonnx.onnx", zoo.inputs(2))
    assert (report.format, report.opset, report.warnings) == ("qonnx", 18, ())
    model, inputs = opened(report.path), zoo.inputs(1)
    feeds = {each.name: x.numpy() for each, x in zip(model.graph.input, inputs, strict=True)}
    found = execution.execute_onnx(model, feeds)
    for value, expected in zip(model.graph.output, zoo_model(*inputs), strict=True):
        assert zoo.apart(found[value.name], expected) < 1e-5


def test_its_accounting_finds_our_bits_and_operations(zoo: SimpleNamespace, tmp_path: Path) -> None:
    layers = [
        zoo.alone(nn.Conv2d(4, 6, 3, padding=1), zoo.numbers(3, 5, "unsigned")),
        zoo.alone(nn.Conv2d(6, 6, 3, padding=1, groups=6), zoo.numbers(7, 2, "signed")),
        nn.Flatten(),
        zoo.alone(nn.Linear(180, 5), zoo.numbers(4, 11, "unsigned")),
    ]
    model = nn.Sequential(*layers).eval()
    report = export(model, tmp_path / "net.qonnx.onnx", torch.zeros(1, 4, 6, 5))
    found = accounting.inference_cost(opened(report.path), discount_sparsity=False)
    found = found.get("total_cost", found)
    macs = {"0.0": 30 * 6 * 4 * 9, "1.0": 30 * 6 * 9, "3.0": 180 * 5}
    ours = {name: (layer.weight_bits, layer.input_bits) for name, layer in deployed_layers(model).items()}
    assert found["total_macs"] == sum(macs.values())
    assert found["total_bops"] == sum(macs[name] * weight * given for name, (weight, given) in ours.items())
    counts = {name: layer.weight.numel() for name, layer in deployed_layers(model).items()}
    assert found["total_mem_w_bits"] == sum(counts[name] * weight for name, (weight, _) in ours.items())
    assert found["unsupported"] == "set()"


def test_bits_are_data_and_weights_lie_on_their_levels(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = zoo.alone(nn.Conv2d(4, 6, 3), zoo.numbers(3, 11, "signed"))
    export(model, tmp_path / "conv.qonnx.onnx", torch.zeros(1, 4, 6, 5))
    file = onnx.load(tmp_path / "conv.qonnx.onnx")
    onnx.checker.check_model(file)
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in file.graph.initializer}
    quants = [node for node in file.graph.node if node.op_type == "Quant"]
    assert {node.domain for node in quants} == {"qonnx.custom_op.general"}
    assert sorted(float(arrays[node.input[3]]) for node in quants) == [3, 11]
    weight = next(node for node in quants if node.input[0] in arrays)
    codes = arrays[weight.input[0]] / arrays[weight.input[1]]
    assert np.abs(codes).max() <= 3
    assert np.abs(codes - np.rint(codes)).max() < 1e-6
