"""The portable ONNX file holds the trained numbers, and a faithful session computes the trained codes from them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nipq.export.api import ExportReport, export
from nipq.export.onnx_write import FIXED_BATCH, PACKED, PACKED_INT2, WIDE, onnx_bytes
from nipq.export.portable import portable_layers
from nipq.export.runtimes import faithful_session
from nipq.nn.deployed import DeployedLayer, deployed_layers
from nipq.nn.kinds import along_channels

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

each_layer = st.lists(
    st.tuples(
        st.integers(2, 16),
        st.one_of(st.none(), st.integers(2, 16)),
        st.sampled_from(["signed", "unsigned", "shifted"]),
        st.sampled_from([1, 2]),
    ),
    min_size=7,
    max_size=7,
)


class File:
    """An ONNX file taken apart, with the tensors that its metadata name as outputs of their own."""

    def __init__(self, path: Path, *, full_check: bool = True) -> None:
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=full_check)
        self.arrays = {each.name: onnx.numpy_helper.to_array(each) for each in self.model.graph.initializer}
        self.facts = json.loads(next(each.value for each in self.model.metadata_props if each.key == "nipq"))
        self.layers = {layer["name"]: layer for layer in self.facts["layers"]}
        self.nodes = [node.op_type for node in self.model.graph.node]
        self.opset = {each.domain: each.version for each in self.model.opset_import}

    def array(self, layer: str, role: str) -> Any:
        return self.arrays[self.layers[layer][role]]

    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """Every output, and codes and output of every layer."""
        self.model.graph.output.extend(
            onnx.ValueInfoProto(name=layer[role])
            for layer in self.layers.values()
            for role in ("codes", "output")
            if layer[role] is not None and layer[role] not in {each.name for each in self.model.graph.output}
        )
        onnx.save(self.model, path)
        session = faithful_session(path, threads=1)
        feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
        return dict(zip([each.name for each in session.get_outputs()], session.run(None, feeds), strict=True))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(drawn=each_layer, batch=st.integers(1, 3), pack=st.booleans())
def test_every_kind_of_layer_bits_and_grid(
    zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any], batch: int, pack: bool
) -> None:
    model = zoo.deployed([zoo.numbers(*numbers) for numbers in drawn])
    path = tmp_path_factory.mktemp("onnx") / "zoo.onnx"
    export(model, path, zoo.inputs(2), pack=pack)
    file = File(path)
    for name, numbers in portable_layers(model).items():
        np.testing.assert_array_equal(file.array(name, "weight").astype(np.int32), numbers.weight.int())
        np.testing.assert_array_equal(file.array(name, "weight_scale"), numbers.weight_scale)
        np.testing.assert_array_equal(file.array(name, "bias"), numbers.bias)
        if numbers.input is not None:
            np.testing.assert_array_equal(file.array(name, "input_scale"), numbers.input.scale)
            assert file.array(name, "input_zero_point") == numbers.input.zero_point
    inputs = zoo.inputs(batch)
    found = file.run(path.with_name("taps.onnx"), inputs)
    for name, (x, y) in zoo.calls_of(model, inputs).items():
        layer = deployed_layers(model)[name]
        if isinstance(layer, DeployedLayer):
            codes = found[file.layers[name]["codes"]].astype(np.int32) - layer.zero_point
            np.testing.assert_array_equal(codes, layer.codes(x), name)
        assert zoo.apart(found[file.layers[name]["output"]], y) < 1e-5, name
    for index, expected in enumerate(model(*inputs)):
        assert zoo.apart(found[f"output_{index}"], expected) < 1e-5


@pytest.fixture(scope="module")
def exported(zoo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    """One convolution of 4 x 6 x 5 pictures, weights of 4 bits and inputs of 5, and its file."""
    torch.manual_seed(0)
    model = zoo.alone(nn.Conv2d(4, 6, 3, padding=1))
    return model, export(model, tmp_path_factory.mktemp("conv") / "conv.onnx", torch.zeros(1, 4, 6, 5))


def test_form_of_the_file(exported: tuple[nn.Module, ExportReport]) -> None:
    report = exported[1]
    file = File(report.path)
    assert sorted(file.nodes) == ["Clip", "Conv", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]
    assert (file.opset, file.model.ir_version, report.opset) == ({"": 21}, 10, 21)
    sizes = file.model.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 4, 6, 5]
    assert [each.name for each in file.model.graph.output] == ["output"]
    assert report.bytes == report.path.stat().st_size
    assert (report.layers, report.warnings) == ((("0", 4, "int8", 5),), ())


def test_metadata_say_which_tensor_is_what(exported: tuple[nn.Module, ExportReport]) -> None:
    file = File(exported[1].path)
    assert (file.facts["format"], file.facts["version"]) == ("qcdq", 1)
    assert "products" not in file.facts  # as there are none
    assert file.facts["layers"] == [
        {
            "name": "0", "kind": "Conv2d",
            "weight": "0.weight", "weight_scale": "0.weight_scale", "bias": "0.bias",
            "input_scale": "0.input_scale", "input_zero_point": "0.input_zero_point",
            "codes": "0.codes", "output": "output",
            "weight_bits": 4, "input_bits": 5, "grid": "unsigned", "zero_point": 0, "code_low": 0, "code_high": 31,
        }
    ]  # fmt: skip


def test_nothing_of_the_exporting_machine_is_in_the_file(
    exported: tuple[nn.Module, ExportReport], picture: Tensor
) -> None:
    model, report = exported
    data = report.path.read_bytes()
    assert b".py" not in data
    assert str(Path.cwd()).encode() not in data
    assert data == onnx_bytes(model, picture, pack=False)[0]


def test_a_faithful_session_is_told_so(exported: tuple[nn.Module, ExportReport]) -> None:
    session = faithful_session(exported[1].path, threads=1)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert options.intra_op_num_threads == 1
    assert options.enable_mem_reuse
    assert session.get_providers() == ["CPUExecutionProvider"]
    apart = faithful_session(exported[1].path, reuse_memory=False)
    assert not apart.get_session_options().enable_mem_reuse


CONTAINERS = (  # input bits, grid, whether a Clip is needed
    (8, "unsigned", False), (8, "shifted", False), (8, "signed", True), (3, "shifted", True),
    (16, "unsigned", False), (12, "unsigned", True), (16, "signed", True),
)  # fmt: skip


def test_clip_only_where_the_container_is_wider_and_saturation_everywhere(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = zoo.deployed([zoo.numbers(4, bits, grid) for bits, grid, _ in CONTAINERS])
    report = export(model, tmp_path / "zoo.onnx", zoo.inputs(2))
    assert report.warnings == (WIDE,)
    file = File(tmp_path / "zoo.onnx")
    extremes = torch.tensor([1e30, -1e30, 3e9, -3e9, float("inf"), float("-inf"), 0.0])
    inputs = tuple(extremes[torch.randint(7, x.shape)] for x in zoo.inputs(2))
    calls, found = zoo.calls_of(model, inputs), file.run(tmp_path / "taps.onnx", inputs)
    producers = {node.output[0]: node for node in file.model.graph.node}
    for kind, (bits, _, clipped) in zip(zoo.kinds, CONTAINERS, strict=True):
        name = f"layers.{kind}"
        layer, codes = deployed_layers(model)[name], file.layers[name]["codes"]
        np.testing.assert_array_equal(found[codes].astype(np.int32) - layer.zero_point, layer.codes(calls[name][0]))
        last = producers[codes]
        before = producers.get(last.input[0])
        assert last.op_type == ("Clip" if clipped and bits <= 8 else "QuantizeLinear")
        assert (before is not None and before.op_type == "Clip") == (clipped and bits > 8)  # on the float


def test_negative_scales_turn_the_codes(zoo: SimpleNamespace) -> None:
    for layer in (nn.Linear(7, 6), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        model = zoo.alone(layer)
        deployed, numbers = model[0], portable_layers(model)["0"]
        assert bool((deployed.scale < 0).any())
        assert bool((numbers.weight_scale > 0).all())
        codes, step = deployed.weight_codes, deployed.input_step.double()
        expected = codes.double() * along_channels(deployed.scale.double(), layer, codes)
        found = numbers.weight.double() * along_channels(numbers.weight_scale.double(), layer, codes) * step
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx"])
def test_a_channel_that_is_always_its_offset(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor, name: str) -> None:
    """A gamma of 0 must not become a scale of 0, by which readers divide."""
    model = zoo.alone(nn.Conv2d(4, 6, 3))
    model[0].scale[2], model[0].scale[3] = 0.0, -0.0
    export(model, tmp_path / name, picture)
    file = File(tmp_path / name, full_check=name == "model.onnx")
    assert (file.array("0", "weight_scale") > 0).all()
    assert not file.array("0", "weight")[2:4].any()
    if name == "model.onnx":
        found = faithful_session(tmp_path / name).run(None, {"input": picture.numpy()})[0]
        assert zoo.apart(found, model(picture)) < 1e-5
        np.testing.assert_array_equal(found[:, 2:4], model(picture)[:, 2:4])


def test_packed_weights(zoo: SimpleNamespace, tmp_path: Path) -> None:
    containers = {2: "int2", 3: "int4", 4: "int4", 8: "int8"}
    model = nn.Sequential(*(zoo.alone(nn.Linear(32, 32), zoo.numbers(bits, 6, "signed")) for bits in containers))
    x = torch.randn(3, 32)
    plain = export(model, tmp_path / "plain.onnx", x)
    packed = export(model, tmp_path / "packed.onnx", x, pack=True)
    assert [layer.container for layer in plain.layers] == ["int8"] * 4
    assert [layer.container for layer in packed.layers] == list(containers.values())
    assert (plain.warnings, packed.warnings) == ((), (PACKED, PACKED_INT2))
    file = File(tmp_path / "packed.onnx")
    assert (packed.opset, file.opset[""], file.model.ir_version) == (25, 25, 13)
    stored = {each.name: each for each in file.model.graph.initializer}
    for layer, (name, numbers) in zip(packed.layers, portable_layers(model).items(), strict=True):
        weight = stored[file.layers[name]["weight"]]
        assert weight.data_type == getattr(onnx.TensorProto, layer.container.upper())
        assert len(weight.raw_data) == 32 * 32 * int(layer.container[3:]) // 8
        np.testing.assert_array_equal(file.array(name, "weight").astype(np.int8), numbers.weight)
    results = [faithful_session(report.path).run(None, {"input": x.numpy()})[0] for report in (plain, packed)]
    np.testing.assert_array_equal(*results)


def test_four_bits_need_no_newer_operators(zoo: SimpleNamespace, tmp_path: Path) -> None:
    report = export(zoo.alone(nn.Linear(7, 6)), tmp_path / "model.onnx", torch.zeros(1, 7), pack=True)
    assert (report.opset, report.layers[0].container, report.warnings) == (21, "int4", (PACKED,))


def test_tied_weights_are_one_initialiser(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = nn.Sequential(zoo.alone(nn.Linear(7, 7)), zoo.alone(nn.Linear(7, 7)))
    model[1][0].layer.weight, model[1][0].tied_to = model[0][0].weight_codes, "0.0"
    model[1][0].scale = model[0][0].scale.abs()
    model[0][0].scale = model[0][0].scale.abs()
    export(model, tmp_path / "tied.onnx", torch.randn(2, 7), pack=True)
    file = File(tmp_path / "tied.onnx")
    assert file.layers["0.0"]["weight"] == file.layers["1.0"]["weight"]
    x = torch.randn(2, 7)
    assert zoo.apart(file.run(tmp_path / "taps.onnx", (x,))["output"], model(x)) < 1e-5


def test_a_layer_called_twice_has_two_records(zoo: SimpleNamespace, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = zoo.alone(nn.Linear(7, 7))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    export(model, tmp_path / "twice.onnx", torch.randn(2, 7))
    first, second = File(tmp_path / "twice.onnx").facts["layers"]
    assert (first["codes"], second["codes"]) == ("layer.0.codes", "layer.0.codes_1")
    assert first["weight"] == second["weight"]


class Doubled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_gets_its_bias_behind_its_forward(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor) -> None:
    model = zoo.alone(Doubled(4, 6, 3))
    export(model, tmp_path / "model.onnx", picture)
    found = faithful_session(tmp_path / "model.onnx").run(None, {"input": picture.numpy()})[0]
    assert zoo.apart(found, model(picture)) < 1e-5


def test_a_fixed_batch_is_a_warning(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = zoo.alone(nn.Conv2d(4, 6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.reshape(2, 4, 6, 5))

    assert export(Fixed(), tmp_path / "model.onnx", picture).warnings == (FIXED_BATCH,)


def test_linear_layers_of_three_axes(zoo: SimpleNamespace, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 7)
    model = nn.Sequential(zoo.alone(nn.Linear(7, 6)), nn.ReLU(), zoo.alone(nn.Linear(6, 4)))
    path = export(model, tmp_path / "model.onnx", x).path
    (found,) = faithful_session(path, threads=1).run(None, {"input": torch.cat([x, x]).numpy()})
    assert zoo.apart(found, model(torch.cat([x, x]))) < 1e-6
