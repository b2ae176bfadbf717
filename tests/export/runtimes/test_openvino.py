"""OpenVINO computes the trained layers in integers, and what it does otherwise is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config
from nipq.errors import ConfigError, FileFormatError
from nipq.export.api import export
from nipq.export.openvino import PRECISION, openvino_model
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import quantizers, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.verify import verify
from tests.prepare.attention_net import MIX, SCORES, X, prepared

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

INPUTS = torch.zeros(2, 2, 6, 6)


def test_every_layer_runs_in_integers_and_the_task_agrees(trained: Any, folder: Path) -> None:
    model, data = trained
    compiled = openvino_model(folder / "model.onnx", data[0][0][:8], threads=1)
    assert [kernel.name for kernel in compiled.kernels] == ["stem", "depthwise", "one", "two", "head"]
    assert all(kernel.integer and kernel.expected for kernel in compiled.kernels), compiled.kernels
    assert compiled.warnings == ()
    result = verify(model, folder / "model.onnx", compiled, loader=data)
    assert result, str(result)
    with torch.no_grad():
        expected = convert(model)(data[0][0])
    found = compiled(data[0][0])
    assert isinstance(found, Tensor)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Residual(nn.Module):
    """Of linear layers without bias, whose scale OpenVINO moves behind the sum; the kernel's name goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x.relu())
        return x + self.two(nn.functional.layer_norm(x, (16,)))


def test_a_layer_is_found_by_its_weight_where_its_kernel_was_renamed(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 16)
    model = calibrate_(prepare_(Residual(), x, Config(weight_bits=4, activation_bits=8)), [x])
    export(convert(model.eval()), tmp_path / "model.onnx", x)
    kernels = openvino_model(tmp_path / "model.onnx", x).kernels
    assert [(kernel.name, kernel.integer) for kernel in kernels] == [("one", True), ("two", True)]


def test_another_batch_size_is_compiled_when_it_comes(trained: Any, folder: Path) -> None:
    """Not left open: with an open batch size a residual sum in deeper nets reads what was overwritten."""
    model, data = trained
    compiled = openvino_model(folder / "model.onnx", data[0][0][:8], threads=1)
    with torch.no_grad():
        expected = convert(model)(data[0][0])
    for count in (8, 3, 40, 8):
        found = compiled(data[0][0][:count])
        assert isinstance(found, Tensor)
        assert torch.allclose(found, expected[:count], rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(compiled.programs) == 3
    assert all(not port.partial_shape.is_dynamic for program in compiled.programs.values() for port in program.inputs)


@pytest.mark.slow
def test_a_deep_net_with_residual_sums_agrees(tmp_path: Path) -> None:
    """With an open batch size the logits move by more than a tenth, with a fixed one not (guide on OpenVINO)."""
    models = pytest.importorskip("torchvision").models
    runtime = pytest.importorskip("openvino")
    x = torch.randn(4, 3, 96, 96)
    model = calibrate_(prepare_(models.mobilenet_v2(), x, Config(granularity="channel")), [x])
    draw = random.Random(0)
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(draw.randint(3, 8))
    deployed, path = convert(model.eval()), tmp_path / "model.onnx"
    export(deployed, path, x)
    compiled = openvino_model(path, x, threads=1)
    assert len(compiled.kernels) == 53
    with torch.no_grad():
        expected = deployed(x)

    def apart(found: Any) -> float:
        return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())

    assert apart(compiled(x)) < 1e-5
    core = runtime.Core()
    as_it_is = core.compile_model(core.read_model(path), "CPU", PRECISION)
    if apart(next(iter(as_it_is({0: x.numpy()}).values()))) < 0.1:
        pytest.skip(f"OpenVINO {runtime.__version__} no longer has the fault: let the batch size open, and say so")


def test_packed_weights_run_in_floats_and_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"OpenVINO: expected integer kernels .* found floats for stem \(f32"):
        openvino_model(folder / "packed.onnx", INPUTS)
    compiled = openvino_model(folder / "packed.onnx", INPUTS, strict=False)
    assert set(compiled.float_layers()) == {"stem", "depthwise", "one", "two", "head"}


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
def test_linear_layers_of_any_axes_run_in_integers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """OpenVINO fuses a chain of small ones into one node of another kind."""
    x = torch.randn(shape)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    calibrate_(prepare_(model, x, Config(weight_bits=8, activation_bits=6)), [x])
    deployed = convert(model.eval())
    export(deployed, tmp_path / "model.onnx", x)
    compiled = openvino_model(tmp_path / "model.onnx", x)
    assert [(kernel.name, kernel.integer) for kernel in compiled.kernels] == [("0", True), ("2", True)]
    with torch.no_grad():
        expected, found = deployed(x), compiled(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_wide_inputs_and_shared_ones_are_warned_of(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 8, 3)
            self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.wide(x))
            return torch.relu(self.left(x)) + torch.relu(self.right(x))

    x = torch.randn(4, 3, 8, 8)
    config = Config(weight_bits=8, activation_bits=8, input_bits=12)
    model = calibrate_(prepare_(Branches(), x, config), [x])
    export(convert(model.eval()), tmp_path / "model.onnx", x)
    compiled = openvino_model(tmp_path / "model.onnx", x)
    assert [warning.split(":")[0] for warning in compiled.warnings] == ["wide", "left", "right"]
    assert "drops the quantizer of 12-bit inputs" in compiled.warnings[0]
    assert not any(kernel.expected for kernel in compiled.kernels)


def test_a_shift_that_is_not_whole_is_warned_of(folder: Path, tmp_path: Path) -> None:
    """As in files that put a float shift around the quantizer; ours hold whole zero points."""
    model = onnx.load(folder / "model.onnx")
    dequantize = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 3][3]
    summed = next(node for node in model.graph.node if dequantize.output[0] in node.input)
    model.graph.initializer.append(onnx.helper.make_tensor("shift", 1, [], [0.1]))
    place = list(model.graph.node).index(summed)
    model.graph.node.insert(place, onnx.helper.make_node("Sub", [dequantize.output[0], "shift"], ["lowered"]))
    model.graph.node[place + 1].input[0] = "lowered"
    onnx.save(model, tmp_path / "model.onnx")
    compiled = openvino_model(tmp_path / "model.onnx", INPUTS, strict=False)
    assert compiled.warnings[0].startswith("two: its input is not quantized with a whole zero point")


def test_a_file_that_cannot_be_compiled_is_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].op_type = "MatMul"
    del model.graph.node[-1].attribute[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FileFormatError, match="expected"):
        openvino_model(tmp_path / "model.onnx", INPUTS)


@pytest.mark.parametrize("bits", [4, 8, 9])
def test_attention_is_multiplied_on_its_levels_up_to_8_bits(tmp_path: Path, bits: int) -> None:
    set_bits_(model := prepared(Config(attention_bits=(2, 16))), {"*": 4, "*.attention_products.*": bits})
    deployed, path = convert(model.eval()), tmp_path / "model.onnx"
    export(deployed, path, X)
    compiled = openvino_model(path, X, threads=1)
    said = [warning for warning in compiled.warnings if "drops the quantizer of 9-bit operands" in warning]
    if bits > 8:
        assert [warning.split(": O")[0] for warning in said] == [f"{n}: {part}" for n in (SCORES, MIX) for part in "xy"]
        return
    assert said == []
    result = verify(model, compiled, loader=[X])
    assert result, str(result)
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(compiled(X)), deployed(X), rtol=0, atol=1e-5)
