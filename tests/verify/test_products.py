"""Products inside attention are proven in every format, and what is planted in them is found, with their name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config
from nipq.export.api import export
from nipq.export.packed_write import save
from nipq.nn.deployed import DeployedProduct, deployed_products
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import set_bits_
from nipq.verify import verify
from tests.prepare.attention_net import MIX, SCORES, X, prepared
from tests.verify.planting import Graph, array_changed, checks, first, rewritten

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Exported = dict[str, Path]
DATA = [X, 2 * torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(1))]
ONE_ULP = np.float32(9)


def attention(bits: int = 4) -> nn.Module:
    model = prepared(Config(attention_bits=(2, 16)))
    set_bits_(model, {"*": 4, "*.attention_products.*": bits})
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return attention()


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The net in every format, by the end of the file's name; not to be changed."""
    folder, deployed = tmp_path_factory.mktemp("products"), convert(model)
    paths = {end: folder / f"model{end}" for end in (".nipq.safetensors", ".onnx", ".qonnx.onnx", ".npz", ".pt2")}
    save(deployed, paths[".nipq.safetensors"])
    for end, path in paths.items():
        if end != ".nipq.safetensors":
            export(deployed, path, X)
    return paths


def test_every_format_is_proven(model: nn.Module, files: Exported) -> None:
    result = verify(model, convert(model), *files.values(), loader=DATA)
    assert result, str(result)
    found = {(check.artifact, check.name[:2]): check.numbers for check in result.checks}
    operands = sum(len(x) for x in DATA) * (4 * 96 - 24)  # query, key, value and 72 probabilities of a sample
    layers = sum(x.numel() for x in DATA) * 2
    for name in ("deployed model", "model.onnx", "model.qonnx.onnx", "model.nipq.safetensors"):
        assert found[name, "E0"]["products"] == 2
        assert found[name, "E1"]["codes"] == operands + layers
        assert found[name, "E1"]["wrong"] == 0
    assert found["model.npz", "E1"]["codes"] == 2 * (4 * 96 - 24 + 2 * 96)
    assert found["model.npz", "E3"]["layers_computed"] == 4


@pytest.mark.parametrize("bits", [8, 16])
def test_wide_operands_are_proven(tmp_path: Path, bits: int) -> None:
    """At 16 bits float32 has no digit to spare: more codes of what arrives may flip, as E1 allows."""
    model = attention(bits)
    deployed = convert(model)
    export(deployed, tmp_path / "model.onnx", X)
    result = verify(model, deployed, tmp_path / "model.onnx", loader=DATA)
    assert result, str(result)


# ---------------------------------------------------------------------- faults in a graph


def step_one_ulp(graph: Graph) -> None:
    name = f"{SCORES}.y.input_scale"
    graph.put(name, np.nextafter(graph.value(name), ONE_ULP))


def dropped_clip(operand: str) -> Callable[[Graph], None]:
    def fault(graph: Graph) -> None:
        clip = graph.makes(f"{operand}.codes")
        quantize = graph.makes(clip.input[0])
        for node in graph.reads(clip.output[0]):
            node.input[0] = quantize.output[0]
        graph.nodes.remove(clip)

    return fault


def one_bit_more(graph: Graph) -> None:
    clip = graph.makes(f"{SCORES}.x.codes")
    for place in (1, 2):
        graph.own(clip, place, 2 * graph.value(clip.input[place]) + np.int8(1 if place == 2 else -1))


def other_scale_behind(graph: Graph) -> None:
    graph.node("DequantizeLinear", f"{MIX}.y.codes").input[1] = f"{MIX}.x.input_scale"


def float_operand(graph: Graph) -> None:
    """A product that reads what the quantizer was to read."""
    total = graph.makes(f"{SCORES}.output")
    total.input[1] = graph.node("QuantizeLinear", f"{SCORES}.y.input_scale").input[0]


def another_product(graph: Graph) -> None:
    """Whose numbers are right, but which adds something of its own."""
    total = graph.makes(f"{SCORES}.output")
    total.output[0] = "hidden"
    behind = onnx.helper.make_node("Mul", ["hidden", "hidden"], [f"{SCORES}.output"])
    graph.insert(graph.reads(f"{SCORES}.output")[0], behind)


def claims(change: Callable[[list[Any]], object]) -> Callable[[Graph], None]:
    def fault(graph: Graph) -> None:
        (entry,) = graph.model.metadata_props
        about = json.loads(entry.value)
        change(about["products"])
        entry.value = json.dumps(about)

    return fault


@pytest.mark.parametrize(
    ("fault", "where", "runs"),
    [
        (step_one_ulp, f"{SCORES}: y: step of the input: 1 of 1 differ", True),
        (dropped_clip(f"{SCORES}.x"), f"{SCORES}: x: lowest code: trained -7, in the file -128", False),
        (dropped_clip(f"{MIX}.x"), f"{MIX}: x: highest code: trained 15, in the file 255", True),  # no value reaches it
        (one_bit_more, f"{SCORES}: x: lowest code: trained -7, in the file -15", False),
        (other_scale_behind, f"{MIX}: y: same scale and zero point behind the codes: trained True", False),
        (float_operand, f"{SCORES}: y: step of the input: only trained", False),
        (claims(lambda records: records[0]["y"].update(input_bits=5)), f"{SCORES}: y: input bits: trained 4", True),
        (claims(lambda records: records.pop()), f"{MIX}: x: only the trained model quantizes it", False),
        (claims(lambda records: records.append({**records[0], "name": "more"})), "more: x: only the file", True),
        (another_product, f"model.onnx: {SCORES}: expected a product that makes '{SCORES}.output', found a Mul", None),
        (claims(lambda records: records[0].pop("x")), "metadata: expected products.0.x: Field required", None),
        (claims(lambda records: records[0].update(output="")), f"model.onnx: {SCORES}: expected a product", None),
    ],
)
def test_what_is_planted_in_a_graph_is_found(
    model: nn.Module, files: Exported, tmp_path: Path, fault: Callable[[Graph], None], where: str, runs: bool | None
) -> None:
    """By E0 always; by running as well where it is large enough to be seen in what is run, if it is run at all."""
    graph, path = Graph(files[".onnx"]), tmp_path / "model.onnx"
    fault(graph)
    onnx.save(graph.model, path)
    result = verify(model, path, loader=DATA)
    assert not checks(result)["E0"]
    assert where in first(result, "E0"), str(result)
    assert checks(result).get("E1") is runs, str(result)
    if runs is False:
        assert first(result, "E1").startswith(where.split(":")[0]), str(result)


@pytest.mark.parametrize(
    ("part", "place", "change", "what"),
    [
        (f"{SCORES}.x", 1, lambda v: np.nextafter(v, ONE_ULP), f"{SCORES}: x: step of the input: 1 of 1 differ"),
        (f"{MIX}.y", 3, lambda v: v + 1, f"{MIX}: y: lowest code: trained -7, in the file -15"),
        (f"{MIX}.x", 2, lambda v: v + 1, f"{MIX}: x: zero point: trained 0, in the file 1"),
    ],
)
def test_what_is_planted_in_qonnx_is_found(
    model: nn.Module, files: Exported, tmp_path: Path, part: str, place: int, change: Any, what: str
) -> None:
    graph, path = Graph(files[".qonnx.onnx"]), tmp_path / "model.qonnx.onnx"
    quant = graph.makes(f"{part}.codes")
    graph.own(quant, place, change(graph.value(quant.input[place])).astype(np.float32))
    onnx.save(graph.model, path)
    result = verify(model, path, loader=DATA)
    assert first(result, "E0").startswith(what), str(result)


# ---------------------------------------------------------------------- faults in arrays, and in the deployed model


def fact(product: str, key: str, value: Any, operand: str | None = None) -> Callable[[str, bytes], bytes]:
    def at(member: str, data: bytes) -> bytes:
        if member != "nipq.json":
            return data
        facts = json.loads(data)
        changed = facts["layers"][product]
        (changed if operand is None else changed[operand])[key] = value
        return json.dumps(facts).encode()

    return at


@pytest.mark.parametrize(
    ("change", "where", "runs"),
    [
        (
            array_changed(f"{SCORES}.y.step", lambda v: np.nextafter(v, ONE_ULP)),
            f"{SCORES}.y.step: 1 of 1 differ",
            True,
        ),
        (array_changed(f"{MIX}.x.step", lambda v: 2 * v), f"{MIX}.x.step: 1 of 1 differ", False),
        (fact(MIX, "input_bits", 5, "x"), f"{MIX}: x: input_bits: trained 4, in the file 5", False),
        (fact(MIX, "code_high", 255, "x"), f"{MIX}: x: code_high: trained 15, in the file 255", False),
        (fact(SCORES, "zero_point", 1, "y"), f"{SCORES}: y: zero_point: trained 0, in the file 1", False),
        (fact(SCORES, "y", 3), f"{SCORES}: y", False),
        (fact(SCORES, "kind", "Linear"), f"{SCORES}: kind: trained product, in the file Linear", False),
        (fact(SCORES, "sum_bits", 2), f"{SCORES}: sum_bits: trained", False),
    ],
)
def test_what_is_planted_in_arrays_is_found(
    model: nn.Module, files: Exported, tmp_path: Path, change: Any, where: str, runs: bool
) -> None:
    result = verify(model, rewritten(files[".npz"], tmp_path / "model.npz", change), loader=DATA)
    assert not checks(result)["E0"]
    assert where in first(result, "E0"), str(result)
    assert checks(result)["E1"] is runs, str(result)
    if not runs:
        assert first(result, "E1").startswith(where.split(":")[0].removesuffix(".x.step")), str(result)


def wider(product: DeployedProduct) -> None:
    product.x.code_high *= 2


def other_step(product: DeployedProduct) -> None:
    product.y.step *= 1.5


def other_product(product: DeployedProduct) -> None:
    product.forward = lambda x, y, drop=0.0: DeployedProduct.forward(product, x, y, drop) * 1.001


def other_shape(product: DeployedProduct) -> None:
    product.forward = lambda x, y, drop=0.0: DeployedProduct.forward(product, x, y, drop)[:, :1]


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (other_step, f"{SCORES}: y: "),
        (wider, f"{SCORES}: x: "),
        (other_product, f"{SCORES}: the output differs by"),
        (other_shape, f"{SCORES}: called differently often, or on other shapes"),
    ],
)
def test_a_product_answers_for_itself(model: nn.Module, fault: Callable[[DeployedProduct], None], where: str) -> None:
    deployed = convert(model)
    fault(deployed_products(deployed)[SCORES])
    result = verify(model, deployed, loader=DATA)
    assert first(result, "E1").startswith(where), str(result)


def test_codes_of_operands_are_held_against_phase_int(model: nn.Module) -> None:
    deployed = convert(model)
    key = deployed_products(deployed)[SCORES].y
    key.code_high -= 1
    result = verify(model, deployed, loader=DATA)
    assert first(result, "E3").startswith(f"{SCORES}: y: ")


def test_a_product_that_is_not_called_is_missed(model: nn.Module) -> None:
    deployed = convert(model)
    deployed.inner.attention_products.mix.forward = lambda x, y, drop=0.0: x @ y
    deployed.inner.attention_products.scores = Float()
    result = verify(model, deployed, loader=DATA)
    assert first(result, "E0").startswith(f"{SCORES}: x: step: only trained")
    assert first(result, "E1").startswith(f"{SCORES}: x: called differently often")


class Float(nn.Module):
    def forward(self, x: Tensor, y: Tensor, drop: float = 0.0) -> Tensor:
        del drop
        return x @ y
