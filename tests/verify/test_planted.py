"""What is planted in an exported file is found, with the layer's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nipq.verify import verify
from tests.verify.planting import Graph, array_changed, checks, first, rewritten

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

Exported = dict[str, Path]


# ---------------------------------------------------------------------- faults in a graph


def one_ulp(graph: Graph) -> None:
    scale = graph.value("stem.weight_scale")
    scale[3] = np.nextafter(scale[3], np.float32(9))
    graph.put("stem.weight_scale", scale)


def input_scale_one_ulp(graph: Graph) -> None:
    graph.put("two.input_scale", np.nextafter(graph.value("two.input_scale"), np.float32(9)))


def dropped_clip(graph: Graph) -> None:
    quantize = graph.node("QuantizeLinear", "one.input_scale")
    clip = graph.node("Clip", quantize.output[0])
    for node in graph.reads(clip.output[0]):
        node.input[0] = quantize.output[0]
    graph.nodes.remove(clip)


def bias_on_a_coarse_grid(graph: Graph) -> None:
    """What a runtime does that makes an int32 of it."""
    step = graph.value("depthwise.weight_scale") * graph.value("depthwise.input_scale")
    graph.put("depthwise.bias", (np.rint(graph.value("depthwise.bias") / step) * step).astype(np.float32))


def shift_not_whole(graph: Graph) -> None:
    """The trained zero point as a float shift around codes that start at 0, off by a fraction of a step."""
    quantize = graph.node("QuantizeLinear", "two.input_scale")
    dequantize = next(
        node for node in graph.nodes if node.op_type == "DequantizeLinear" and "two.input_scale" in node.input
    )
    step, zero = graph.value("two.input_scale"), graph.value("two.input_zero_point")
    x, y = quantize.input[0], dequantize.output[0]
    for node in (quantize, dequantize):
        graph.own(node, 2, np.zeros((), zero.dtype))
    add, subtract = helper.make_node("Add", [x, ""], ["lifted"]), helper.make_node("Sub", ["above", ""], [y])
    for node in (add, subtract):
        graph.own(node, 1, np.float32((int(zero) + 0.4) * step))
    quantize.input[0], dequantize.output[0] = "lifted", "above"
    graph.insert(quantize, add)
    graph.insert(graph.reads(y)[0], subtract)


def swapped_weights(graph: Graph) -> None:
    one, two = (graph.node("DequantizeLinear", f"{name}.weight") for name in ("one", "two"))
    one.input[0], two.input[0] = two.input[0], one.input[0]


def one_bit_more(graph: Graph) -> None:
    quantize = graph.node("QuantizeLinear", "head.input_scale")
    clip = graph.node("Clip", quantize.output[0])
    graph.own(clip, 2, 2 * graph.value(clip.input[2]) + 1)


def other_scale_behind(graph: Graph) -> None:
    dequantize = next(
        node for node in graph.nodes if node.op_type == "DequantizeLinear" and "one.input_scale" in node.input
    )
    dequantize.input[1] = "two.input_scale"


def one_code(graph: Graph) -> None:
    codes = graph.value("depthwise.weight")
    codes.flat[5] ^= 1
    graph.put("depthwise.weight", codes)


@pytest.mark.parametrize(
    ("fault", "layer", "what", "runs"),
    [
        (one_ulp, "stem", "weight scale: 1 of 8 differ", True),
        (input_scale_one_ulp, "two", "step of the input", True),
        (dropped_clip, "one", "highest code", False),
        (bias_on_a_coarse_grid, "depthwise", "bias: 8 of 8 differ", False),
        (shift_not_whole, "two", "step of the input: only trained", False),
        (swapped_weights, "one", "weight codes", False),
        (one_bit_more, "head", "highest code", False),
        (other_scale_behind, "one", "same scale and zero point behind the codes", False),
        (one_code, "depthwise", "weight codes: 1 of 72 differ", False),
    ],
)
def test_what_is_planted_in_a_graph_is_found(
    trained: Any,
    exported: Exported,
    tmp_path: Path,
    fault: Callable[[Graph], None],
    layer: str,
    what: str,
    runs: bool,
) -> None:
    """By E0 always; by running as well where it is large enough to be seen in what is run."""
    model, data = trained
    graph, path = Graph(exported[".onnx"]), tmp_path / "model.onnx"
    fault(graph)
    onnx.save(graph.model, path)
    result = verify(model, path, loader=data)
    assert not result
    assert first(result, "E0").startswith(f"{layer}: {what}"), str(result)
    assert checks(result)["E1"] is runs, str(result)
    if not checks(result)["E1"]:
        assert first(result, "E1").startswith(f"{layer}: ")


def test_a_missing_activation_is_seen_by_the_next_quantizer(trained: Any, exported: Exported, tmp_path: Path) -> None:
    """Every layer holds the trained numbers, but something between two of them is gone."""
    model, data = trained
    graph, path = Graph(exported[".onnx"]), tmp_path / "model.onnx"
    swish = next(node for node in graph.nodes if node.op_type == "HardSwish")
    for node in graph.reads(swish.output[0]):
        node.input[0] = swish.input[0]
    graph.nodes.remove(swish)
    onnx.save(graph.model, path)
    result = verify(model, path, loader=data)
    assert checks(result)["E0"]
    assert first(result, "E1").startswith("two: ")
    assert "codes of what arrived flipped" in first(result, "E1")


def test_a_layer_of_other_geometry_is_named(trained: Any, exported: Exported, tmp_path: Path) -> None:
    model, data = trained
    graph, path = Graph(exported[".onnx"]), tmp_path / "model.onnx"
    conv = next(node for node in graph.nodes if node.op_type == "Conv")
    del conv.attribute[:]
    conv.attribute.append(helper.make_attribute("pads", [2, 2, 0, 0]))
    onnx.save(graph.model, path)
    result = verify(model, path, loader=data)
    assert checks(result)["E0"]
    assert first(result, "E1").startswith("stem: the output differs")


def test_a_file_that_does_not_run_on_the_data_fails(trained: Any, exported: Exported, tmp_path: Path) -> None:
    model, data = trained
    graph, path = Graph(exported[".onnx"]), tmp_path / "model.onnx"
    graph.put("one.weight", np.zeros((8, 3, 1, 1), np.int8))
    onnx.save(graph.model, path)
    result = verify(model, path, exported[".onnx"], loader=data, metric=lambda module, _: float(module is model))
    assert [check.passed for check in result.checks] == [False, False, True, True, True]
    assert result.checks[1].claim == "the file runs on the data"
    assert "expected a file that runs on inputs of shape" in first(result, "E1")


@pytest.mark.parametrize(
    ("reads", "place", "change", "what"),
    [
        ("two.input_scale", 3, 1, "two: highest code: trained"),
        ("two.input_scale", 2, 1, "two: zero point: trained"),
        ("head.weight", 3, 1, "head: bits of the weight's Quant: trained"),
        ("one.weight", 0, 1e-6, "one: weight on its levels: trained True"),
    ],
)
def test_what_is_planted_in_qonnx_is_found(
    trained: Any, exported: Exported, tmp_path: Path, reads: str, place: int, change: float, what: str
) -> None:
    model, data = trained
    graph, path = Graph(exported[".qonnx.onnx"]), tmp_path / "model.qonnx.onnx"
    quant = graph.node("Quant", reads)
    graph.own(quant, place, (graph.value(quant.input[place]) + change).astype(np.float32))
    onnx.save(graph.model, path)
    result = verify(model, path, loader=data)
    assert not checks(result)["E0"]
    assert first(result, "E0").startswith(what), str(result)


# ---------------------------------------------------------------------- faults in archives


def swapped(member: str, data: bytes) -> bytes:
    if member != "nipq.json":
        return data
    facts = json.loads(data)
    one, two = (facts["layers"][name]["arrays"] for name in ("one", "two"))
    one["weight"], two["weight"] = two["weight"], one["weight"]
    return json.dumps(facts).encode()


def fact(layer: str, key: str, value: Any) -> Callable[[str, bytes], bytes]:
    def at(member: str, data: bytes) -> bytes:
        if member != "nipq.json":
            return data
        facts = json.loads(data)
        facts["layers"][layer][key] = value
        return json.dumps(facts).encode()

    return at


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (array_changed("stem.scale", lambda v: np.nextafter(v, np.float32(9))), "stem.scale: 8 of 8 differ"),
        (array_changed("two.weight", lambda v: v.astype(np.int16)), "two.weight: another type or shape"),
        (array_changed("depthwise.offset", lambda v: v + np.float32(0.01)), "depthwise.offset: 8 of 8 differ"),
        (swapped, "one: arrays: trained"),
        (fact("head", "input_bits", 7), "head: input_bits: trained"),
        (fact("two", "code_high", 500), "two: code_high: trained"),
        (fact("two", "stride", [10**9, 1]), "two: stride: trained"),
    ],
)
def test_what_is_planted_in_arrays_is_found(
    trained: Any, exported: Exported, tmp_path: Path, change: Callable[[str, bytes], bytes], where: str
) -> None:
    model, data = trained
    result = verify(model, rewritten(exported[".npz"], tmp_path / "model.npz", change), loader=data)
    assert not checks(result)["E0"]
    assert first(result, "E0").startswith(where), str(result)


def test_numpy_itself_is_compared(trained: Any, exported: Exported, tmp_path: Path) -> None:
    """Weights that differ are run all the same, as nothing about them can hang: E1 and E3 see them, too."""
    model, data = trained
    wrong = array_changed("two.weight", lambda v: np.roll(v, 1, 0))
    result = verify(model, rewritten(exported[".npz"], tmp_path / "model.npz", wrong), loader=data)
    assert checks(result) == {"E0": False, "E1": False, "E3": False}
    assert first(result, "E1").startswith("two: the output differs")
    assert first(result, "E3").startswith("two: the output differs")


def clamp(member: str, data: bytes) -> bytes:
    """A dropped Clip: the third one lets everything through."""
    if not member.endswith("models/model.json"):
        return data
    program = json.loads(data)
    clamps = [node for node in program["graph_module"]["graph"]["nodes"] if "clamp" in node["target"]]
    clamps[2]["inputs"][2]["arg"] = {"as_int": 10**6}
    return json.dumps(program).encode()


def weight_byte(member: str, data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if member.endswith("weights/weight_0") else data


@pytest.mark.parametrize(
    ("change", "where"), [(clamp, "one: node 'clamp_2'"), (weight_byte, "stem.scale: 1 of 32 bytes")]
)
def test_what_is_planted_in_a_program_is_found(
    trained: Any, exported: Exported, tmp_path: Path, change: Callable[[str, bytes], bytes], where: str
) -> None:
    model, data = trained
    result = verify(model, rewritten(exported[".pt2"], tmp_path / "model.pt2", change), loader=data)
    assert checks(result) == {"E0": False}  # what differs is not run
    assert first(result, "E0").startswith(where), str(result)
