"""Products inside attention in exported files: the trained steps and codes, and what others compute from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nipq.config import Config, Rule
from nipq.errors import NotQuantizableError
from nipq.export import arrays_reference as reference
from nipq.export.api import export
from nipq.export.onnx_write import WIDE, promised_bytes
from nipq.export.portable import portable_products
from nipq.export.runtimes import faithful_session
from nipq.functional.grid import Grid, levels
from nipq.nn.deployed import DeployedOperand, deployed_products
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import set_bits_
from nipq.prepare.prepare import prepare_
from tests.prepare.attention_net import MIX, SCORES, Attention, X, prepared

GRIDS = ("signed", "unsigned", "shifted")
#: Bits and grid of query, key, probability and value.
Four = Sequence[tuple[int, str]]
four_operands = st.lists(st.tuples(st.integers(2, 16), st.sampled_from(GRIDS)), min_size=4, max_size=4)


def operand(bits: int, grid: str) -> DeployedOperand:
    n = int(levels(torch.tensor(float(bits)), Grid(grid)))
    zero_point = round(0.4 * n) if grid == "shifted" else 0
    code_range = (-n, n) if grid == "signed" else (-zero_point, n - zero_point)
    step = torch.tensor([2.0 / n]) * (0.9 + 0.2 * torch.rand(1))
    return DeployedOperand(step, bits=bits, grid=grid, zero_point=zero_point, code_range=code_range)


def deployed(four: Four) -> nn.Module:
    """The net with operands as they were drawn, rather than trained."""
    set_bits_(model := prepared(), 4)
    made = convert(model)
    drawn = iter(four)
    for product in deployed_products(made).values():
        product.x, product.y = operand(*next(drawn)), operand(*next(drawn))
    return made


@torch.no_grad()
def calls_of(model: nn.Module, x: Tensor) -> dict[str, tuple[tuple[Tensor, Tensor], Tensor]]:
    """Operands and output of each product."""
    found: dict[str, Any] = {}
    handles = [
        product.register_forward_hook(lambda _, args, y, name=name: found.__setitem__(name, (args[:2], y)))
        for name, product in deployed_products(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


class File:
    """An ONNX file, run with codes and outputs of its products as outputs of its own."""

    def __init__(self, path: Path) -> None:
        self.onnx = pytest.importorskip("onnx")
        self.model, self.path = self.onnx.load(path), path
        self.arrays = {each.name: self.onnx.numpy_helper.to_array(each) for each in self.model.graph.initializer}
        facts = json.loads(next(each.value for each in self.model.metadata_props if each.key == "nipq"))
        self.products = {record["name"]: record for record in facts["products"]}
        self.producers = {node.output[0]: node for node in self.model.graph.node}

    def run(self, x: Tensor) -> dict[str, Any]:
        names = [name for each in self.products.values() for name in (each["x"]["codes"], each["y"]["codes"])]
        names += [each["output"] for each in self.products.values()]
        self.model.graph.output.extend(self.onnx.ValueInfoProto(name=name) for name in names)
        session = faithful_session(self.model.SerializeToString(), threads=1)
        return dict(
            zip([each.name for each in session.get_outputs()], session.run(None, {"x": x.numpy()}), strict=True)
        )


@pytest.mark.parametrize(
    ("four", "batch"),
    [
        ([(3, "signed"), (5, "shifted"), (4, "unsigned"), (7, "signed")], 1),
        ([(8, "shifted"), (8, "signed"), (8, "unsigned"), (8, "shifted")], 5),
        ([(16, "signed"), (11, "shifted"), (16, "unsigned"), (9, "unsigned")], 4),
    ],
)
def test_steps_codes_and_outputs_of_every_grid(zoo: SimpleNamespace, tmp_path: Path, four: Four, batch: int) -> None:
    """Steps to the bit, the trained codes, products as near as layers, for any batch."""
    pytest.importorskip("onnxscript")
    model, path = deployed(four), tmp_path / "model.onnx"
    report = export(model, path, X)
    assert len(report.products) == 2
    assert report.warnings == ((WIDE,) if max(bits for bits, _ in four) > 8 else ())
    file, x = File(path), torch.randn(batch, 6, 16)
    pytest.importorskip("onnx").checker.check_model(file.model, full_check=True)
    found = file.run(x)
    for name, (inputs, output) in calls_of(model, x).items():
        for (part, each), given_ in zip(deployed_products(model)[name].operands().items(), inputs, strict=True):
            record = file.products[name][part]
            np.testing.assert_array_equal(file.arrays[record["input_scale"]], each.step.squeeze())
            assert file.arrays[record["input_zero_point"]] == each.zero_point == record["zero_point"]
            codes = found[record["codes"]].astype(np.int32) - each.zero_point
            np.testing.assert_array_equal(codes, each.codes(given_), f"{name}: {part}")
        assert zoo.apart(found[file.products[name]["output"]], output) < 1e-5
    assert zoo.apart(found["output"], model(x)) < 1e-5


def test_clips_stand_where_those_of_layers_do(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = deployed([(3, "signed"), (8, "signed"), (8, "unsigned"), (12, "signed")])
    export(model, tmp_path / "model.onnx", X)
    file = File(tmp_path / "model.onnx")
    kinds = {}
    for name, record in file.products.items():
        for part in ("x", "y"):
            last = file.producers[record[part]["codes"]]
            before = file.producers[last.input[0]]
            kinds[name, part] = [node.op_type for node in (before, last) if node.op_type in ("Clip", "QuantizeLinear")]
        total = file.producers[record["output"]]
        assert [file.producers[read].input[0] for read in total.input] == [record[part]["codes"] for part in ("x", "y")]
        assert total.op_type == "MatMul"
    assert kinds == {
        (SCORES, "x"): ["QuantizeLinear", "Clip"],
        (SCORES, "y"): ["QuantizeLinear", "Clip"],  # -128 must not appear
        (MIX, "x"): ["QuantizeLinear"],
        (MIX, "y"): ["Clip", "QuantizeLinear"],
    }
    assert file.products[SCORES] == {
        "name": SCORES,
        "x": {
            "input_scale": f"{SCORES}.x.input_scale", "input_zero_point": "inner.qkv.input_zero_point",
            "codes": f"{SCORES}.x.codes",
            "input_bits": 3, "grid": "signed", "zero_point": 0, "code_low": -3, "code_high": 3,
        },
        "y": {
            "input_scale": f"{SCORES}.y.input_scale", "input_zero_point": "inner.qkv.input_zero_point",
            "codes": f"{SCORES}.y.codes",
            "input_bits": 8, "grid": "signed", "zero_point": 0, "code_low": -127, "code_high": 127,
        },
        "output": f"{SCORES}.output",
    }  # fmt: skip


def test_qonnx_has_one_quant_for_each_operand(zoo: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = deployed([(3, "signed"), (5, "shifted"), (11, "unsigned"), (4, "signed")])
    report = export(model, tmp_path / "model.qonnx.onnx", X)
    assert (report.warnings, len(report.products)) == ((), 2)
    file = File(report.path)
    for name, product in deployed_products(model).items():
        total = file.producers[file.products[name]["output"]]
        for read, each in zip(total.input, product.operands().values(), strict=True):
            quant = file.producers[read]
            assert (quant.op_type, quant.domain) == ("Quant", "qonnx.custom_op.general")
            scale, zero_point, bits = (file.arrays[stored] for stored in quant.input[1:])
            np.testing.assert_array_equal(scale, each.step.squeeze())
            assert (zero_point, bits) == (each.zero_point, each.bits)
            attributes = {attribute.name: attribute.i for attribute in quant.attribute}
            assert attributes["signed"] == attributes["narrow"] == (each.grid == "signed")
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    execution, cleanup = (pytest.importorskip(f"qonnx.{name}") for name in ("core.onnx_exec", "util.cleanup"))
    for value in (*file.model.graph.input, *file.model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del file.model.graph.value_info[:]
    opened = cleanup.cleanup_model(wrapper.ModelWrapper(file.model))
    found = execution.execute_onnx(opened, {opened.graph.input[0].name: X[:1].numpy()})
    assert zoo.apart(found[opened.graph.output[0].name], model(X[:1])) < 1e-5


@settings(max_examples=10, deadline=None, derandomize=True)
@given(four=four_operands)
def test_numpy_computes_a_product_to_the_bit(tmp_path_factory: Any, four: Four) -> None:
    model, path = deployed(four), tmp_path_factory.mktemp("products") / "model.npz"
    export(model, path, X)
    layers = reference.load(path)
    assert list(layers) == ["inner.qkv", SCORES, MIX, "inner.out"]
    for name, ((x, y), output) in calls_of(model, 3 * torch.randn(3, 6, 16)).items():
        product = layers[name]
        np.testing.assert_array_equal(reference.run(product, x.numpy(), y.numpy()), output.numpy(), name)
        codes = (reference.codes(reference.operand(product, part), z.numpy()) for part, z in (("x", x), ("y", y)))
        assert np.abs(np.matmul(*codes)).max() < 2 ** (product["sum_bits"] - 1)
        assert product["kind"] == "product"
        assert product["x"]["input_shape"] == list(x.shape[1:])
        assert product["y"]["input_shape"] == list(y.shape[1:])
        assert product["output_shape"] == list(output.shape[1:])
        for part, each in deployed_products(model)[name].operands().items():
            facts = {key: product[part][key] for key in ("input_bits", "grid", "zero_point", "code_low", "code_high")}
            assert list(facts.values()) == [each.bits, each.grid, each.zero_point, each.code_low, each.code_high]
    with pytest.raises(ValueError, match="this is a product inside attention: give both of its operands"):
        reference.run(layers[MIX], np.zeros((1, 2, 6, 6), np.float32))


def test_the_narrowest_accumulator_is_reached(tmp_path: Path) -> None:
    model = deployed([(8, "signed")] * 4)
    export(model, tmp_path / "model.npz", X)
    product = reference.load(tmp_path / "model.npz")[SCORES]
    most = np.full((6, 8), 127) @ np.full((8, 6), 127)
    assert 2 ** (product["sum_bits"] - 2) <= most.max() < 2 ** (product["sum_bits"] - 1)


def test_the_report_lists_products(tmp_path: Path) -> None:
    model = deployed([(3, "signed"), (5, "signed"), (4, "unsigned"), (7, "signed")])
    report = export(model, tmp_path / "model.npz", X)
    assert report.products == ((SCORES, 3, 5), (MIX, 4, 7))
    assert report.to_dict()["products"][1] == {"name": MIX, "x_bits": 4, "y_bits": 7}
    json.dumps(report.to_dict())
    rows = [line for line in str(report).splitlines() if "attention_products" in line]
    assert ["3 x 5" in rows[0], "4 x 7" in rows[1], len(rows)] == [True, True, 2]


@pytest.mark.parametrize(("format", "bits"), [("onnx", 12), ("qonnx", 4)])
def test_a_promise_with_products_is_kept(tmp_path: Path, format: Any, bits: int) -> None:
    """Trained on, steps end elsewhere."""
    pytest.importorskip("onnxscript")
    config = Config(attention_bits=(2, 16), rules=[Rule("*.scores", grid="shifted")])
    set_bits_(model := prepared(config), {"*": 4, "*.attention_products.*": bits})
    promised, before = promised_bytes(model, X, format=format), portable_products(convert(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    trained = convert(model)
    assert portable_products(trained)[SCORES]["y"].scale != before[SCORES]["y"].scale
    assert export(trained, tmp_path / "model", X, format=format).path.stat().st_size == promised


def test_zero_points_of_operands_change_no_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, sizes = deployed([(7, "shifted")] * 4), set()
    for zero_point in (0, 127):
        for product in deployed_products(model).values():
            for each in product.operands().values():
                each.zero_point, each.code_low, each.code_high = zero_point, -zero_point, 127 - zero_point
        report = export(model, tmp_path / f"{zero_point}.onnx", X)
        sizes.add(report.bytes)
        assert File(report.path).products[MIX]["y"]["zero_point"] == zero_point
    assert len(sizes) == 1


class Dropping(Attention):
    """Dropout in evaluation, which a model may ask for by mistake."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        return self.out(y.transpose(1, 2).flatten(2))


def test_dropout_in_evaluation_is_refused_by_name_before_training() -> None:
    with pytest.raises(NotQuantizableError, match=r"0\.attention_products\.mix: expected no dropout where attention"):
        prepare_(nn.Sequential(Dropping()), X, Config(attention_bits=4))
