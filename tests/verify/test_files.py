"""Exported files hold what was trained, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nipq.export.api import export
from nipq.export.packed_write import save
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.verify import verify
from tests.export.packed.conftest import CASES
from tests.export.packed.conftest import trained as prepared

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

Make = Callable[..., tuple[nn.Module, list[Any]]]
Exported = dict[str, Path]


def test_every_format_passes_its_checks(trained: Any, exported: Exported) -> None:
    model, data = trained
    result = verify(model, *exported.values(), loader=data)
    assert result, str(result)
    climbed = {path.name: [r.name[:2] for r in result.checks if r.artifact == path.name] for path in exported.values()}
    assert climbed == {
        "model.nipq.safetensors": ["E0", "E1", "E2", "E3"],
        "model.onnx": ["E0", "E1", "E2"],
        "model.qonnx.onnx": ["E0", "E1", "E2"],
        "packed.onnx": ["E0", "E1", "E2"],
        "model.npz": ["E0", "E1", "E3"],
        "model.pt2": ["E0", "E2", "E3"],
    }
    json.dumps(result.to_dict())
    codes = {check.artifact: check.numbers["codes"] for check in result.checks if check.name == "E1 layers"}
    assert codes["model.onnx"] == codes["model.qonnx.onnx"] == codes["model.nipq.safetensors"] > 0


def test_what_overwrites_a_layer_s_output_is_not_held_against_it(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = prepare_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)), x)
    calibrate_(model, [x])
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(4)
    deployed, files = convert(model.eval()), [tmp_path / f"model{end}" for end in (".onnx", ".npz", ".pt2")]
    for path in files:
        export(deployed, path, x)
    result = verify(model, deployed, *files, loader=[x])
    assert result, str(result)


def test_bytes_are_promised_and_found(trained: Any, exported: Exported) -> None:
    model, data = trained
    result = verify(model, exported[".onnx"], exported["packed.onnx"], exported[".qonnx.onnx"], loader=data)
    portable, packed, qonnx = (check.numbers for check in result.checks if check.name == "E0 static")
    elements = sum(layer.weight.numel() for layer in convert(model).modules() if hasattr(layer, "weight_bits"))
    assert portable["weight_bytes_promised"] == portable["weight_bytes_found"] == elements
    assert packed["weight_bytes_found"] < elements == packed["weight_bytes_promised"]
    assert qonnx["weight_bytes_found"] == 4 * elements
    for numbers, name in ((portable, ".onnx"), (packed, "packed.onnx"), (qonnx, ".qonnx.onnx")):
        assert numbers["bytes_promised"] == numbers["bytes_found"] == exported[name].stat().st_size


def test_more_bytes_than_promised_are_a_difference(trained: Any, exported: Exported, tmp_path: Path) -> None:
    model, data = trained
    file = onnx.load(exported[".onnx"])
    file.doc_string = "what nobody trained"
    onnx.save(file, tmp_path / "model.onnx")
    check = verify(model, tmp_path / "model.onnx", loader=data).checks[0]
    assert not check.passed
    assert check.numbers["bytes_found"] > check.numbers["bytes_promised"] == exported[".onnx"].stat().st_size
    assert check.first_difference is not None
    assert "bytes on disk, promised" in check.first_difference
    file.producer_version = "torch 2.11.0, onnxscript 0.7.0"  # whose bytes nobody here can know
    onnx.save(file, tmp_path / "model.onnx")
    check = verify(model, tmp_path / "model.onnx", loader=data).checks[0]
    assert check.passed
    assert "bytes_promised" not in check.numbers


def test_a_metric_runs_on_files(trained: Any, exported: Exported) -> None:
    model, data = trained

    def largest(module: nn.Module, loader: Any) -> float:
        module.eval()  # as every metric does that was written for models
        return max(float(module(x).max()) for x, _ in loader)

    result = verify(model, *(exported[end] for end in (".onnx", ".npz", ".pt2")), loader=data, metric=largest)
    found = {r.artifact: r.numbers for r in result.checks if r.name == "E2 noise"}
    assert found.keys() == {"model.onnx", "model.pt2"}
    for numbers in found.values():
        assert numbers["metric_deployed"] == pytest.approx(numbers["metric_trained"], rel=0.05)


def test_another_training_fails_in_every_format(made: Make, exported: Exported) -> None:
    other, data = made(bits=(5, 6, 3))
    result = verify(other, *exported.values(), loader=data)
    failed = {check.artifact for check in result.checks if check.name == "E0 static" and not check.passed}
    assert failed == {path.name for path in exported.values()}


@pytest.mark.parametrize("end", [".onnx", ".qonnx.onnx", ".npz", ".pt2"])
def test_another_format_under_the_name_is_refused(trained: Any, tmp_path: Path, end: str) -> None:
    model, data = trained
    path = save(convert(model), tmp_path / f"model{end}")
    result = verify(model, path, loader=data)
    assert not result
    assert result.checks[0].claim == "the file can be read"
    torch.save(model.state_dict(), path)
    assert not verify(model, path, loader=data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_passes_in_every_format(name: str, tmp_path: Path) -> None:
    case = prepared(name)
    deployed, files = convert(case.model), []
    for end in (".onnx", ".qonnx.onnx", ".npz", ".pt2"):
        files.append(tmp_path / f"model{end}")
        export(deployed, files[-1], case.inputs)
    result = verify(case.model, *files, loader=[case.inputs])
    assert result, str(result)
