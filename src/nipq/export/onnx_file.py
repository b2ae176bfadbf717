"""ONNX files: the portable one (QuantizeLinear, Clip, DequantizeLinear) and QONNX's (Quant).

Both go through torch's exporter and say in their metadata, under the key ``nipq``, which tensors of the graph belong to
which layer. The metadata are a help to find things; a proof compares the tensors themselves.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from nipq.deploy.modules import Deployed, DeployedLayer, deployed_layers
from nipq.errors import require
from nipq.export.graph import Binding, onnx_graph
from nipq.export.qcdq import QcdqLayer
from nipq.export.qonnx import QonnxLayer
from nipq.export.report import ExportedLayer
from nipq.trace import ExampleInputs

#: The metadata's one key, and the version of what it holds.
KEY, VERSION = "nipq", 1
#: Lowest versions of ONNX's operators that know 4-bit and 16-bit codes, and 2-bit codes; and the one of QONNX files.
OPSET, OPSET_INT2, OPSET_QONNX = 21, 25, 18
#: Version of the file itself, by that of the operators.
IR_VERSIONS = {OPSET_QONNX: 8, OPSET: 10, OPSET_INT2: 13}

FIXED_BATCH = "the model fixes the size of its batch itself: the file takes batches of the example's size only"
PACKED = (
    "packed INT4 weights: ONNX Runtime's faithful session computes the same at the same speed; OpenVINO runs these "
    "layers in floats instead of integers"
)
PACKED_INT2 = (
    f"packed INT2 weights need opset {OPSET_INT2}: OpenVINO cannot read them, and ONNX Runtime's default session may "
    "refuse the file; open it with nipq.export.session.faithful_session"
)
WIDE = "inputs above 8 bits: ONNX Runtime computes these layers in floats, OpenVINO drops their quantizers"


def onnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs, *, pack: bool
) -> tuple[bytes, int, tuple[ExportedLayer, ...], tuple[str, ...]]:
    """The portable ONNX file.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with.
        pack: store weights of up to 4 bits as INT4, and of 2 bits as INT2.

    Returns:
        The file, its opset, its layers, and what a reader should know.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    layers = deployed_layers(deployed)
    containers = {name: _container(layer, pack=pack) for name, layer in layers.items()}
    opset = OPSET_INT2 if "int2" in containers.values() else OPSET
    model, bindings = onnx_graph(deployed, example_inputs, QcdqLayer, opset)
    for binding in bindings:
        _pack(binding["weight"].producer().inputs[0], containers[binding["name"]])
    warnings = [text for kind, text in (("int4", PACKED), ("int2", PACKED_INT2)) if kind in containers.values()]
    if any(isinstance(layer, DeployedLayer) and layer.input_bits > 8 for layer in layers.values()):
        warnings.append(WIDE)
    return *_written(model, bindings, layers, "qcdq", opset, containers), tuple(warnings + _batch_warning(model))


def qonnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs
) -> tuple[bytes, int, tuple[ExportedLayer, ...], tuple[str, ...]]:
    """The QONNX file, whose ``Quant`` nodes hold bit-widths as data.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with.

    Returns:
        As :func:`onnx_bytes`.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    layers = deployed_layers(deployed)
    model, bindings = onnx_graph(deployed, example_inputs, QonnxLayer, OPSET_QONNX)
    containers = dict.fromkeys(layers, "float32")
    return *_written(model, bindings, layers, "qonnx", OPSET_QONNX, containers), tuple(_batch_warning(model))


def _written(
    model: Any,  # noqa: ANN401  (the package that knows its type is optional)
    bindings: list[Binding],
    layers: dict[str, Deployed],
    form: str,
    opset: int,
    containers: dict[str, str],
) -> tuple[bytes, int, tuple[ExportedLayer, ...]]:
    records = [_record(binding, layers[binding["name"]]) for binding in bindings]
    model.metadata_props[KEY] = _metadata(form, records).ljust(len(_metadata(form, [_longest(r) for r in records])))
    model.ir_version, model.producer_name, model.producer_version = IR_VERSIONS[opset], "nipq", producer()
    ir = require("onnx_ir", extra="onnx", purpose="ONNX files")
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    exported = tuple(
        ExportedLayer(name, layer.weight_bits, containers[name], getattr(layer, "input_bits", None))
        for name, layer in layers.items()
    )
    return data, opset, exported


def producer() -> str:
    """The packages on which the bytes of a file depend beside its model."""
    exporter = require("onnxscript", extra="onnx", purpose="ONNX files")
    return f"torch {torch.__version__}, onnxscript {exporter.__version__}"


def _metadata(form: str, records: list[dict[str, Any]]) -> str:
    return json.dumps({"format": form, "version": VERSION, "layers": records}, separators=(",", ":"))


def _longest(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the most digits that a zero point may have: a file's size is not to depend on where it falls."""
    if record["grid"] != "shifted":
        return record
    levels = 2 ** record["input_bits"] - 1
    return record | {"zero_point": levels, "code_low": -levels, "code_high": levels}


def _record(binding: Binding, layer: Deployed) -> dict[str, Any]:
    """What the metadata say of one call of a layer."""
    weight = binding["weight"].producer().inputs
    codes, bias = binding.get("codes"), binding.get("bias")
    scale, zero_point = (None, None) if codes is None else _input_parameters(codes)
    record = {
        "name": binding["name"],
        "kind": layer.kind,
        "weight": weight[0].name,
        "weight_scale": binding.get("weight_scale", weight[1]).name,
        "bias": None if bias is None else bias.name,
        "input_scale": scale,
        "input_zero_point": zero_point,
        "codes": None if codes is None else codes.name,
        "output": binding["output"].name,
        "weight_bits": layer.weight_bits,
    }
    for key in ("input_bits", "grid", "zero_point", "code_low", "code_high"):
        record[key] = getattr(layer, key, None)
    return record


def _input_parameters(codes: Any) -> tuple[str, str]:  # noqa: ANN401  (as above)
    """Names of scale and zero point: of the node that reads the codes, or of the Quant that is both in one."""
    nodes = [codes.producer(), *(node for node, _ in codes.uses())]
    node = next(node for node in nodes if node.op_type in ("Quant", "DequantizeLinear"))
    return node.inputs[1].name, node.inputs[2].name


def _container(layer: Deployed, *, pack: bool) -> str:
    if pack and layer.weight_bits <= 4:
        return "int2" if layer.weight_bits == 2 else "int4"
    return "int8" if layer.weight_codes.dtype == torch.int8 else "int16"


def _pack(weight: Any, container: str) -> None:  # noqa: ANN401  (as above)
    """Give an initialiser a type that torch cannot hold."""
    if container not in ("int2", "int4"):
        return
    ir = require("onnx_ir", extra="onnx", purpose="ONNX files")
    narrow = np.dtype(getattr(require("ml_dtypes", extra="onnx", purpose="packed ONNX files"), container))
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(narrow), name=weight.name)


def _batch_warning(model: Any) -> list[str]:  # noqa: ANN401  (as above)
    is_open = any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape)
    return [] if is_open else [FIXED_BATCH]
