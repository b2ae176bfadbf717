"""ONNX files: the portable one (QuantizeLinear, Clip, DequantizeLinear) and QONNX's (Quant).

The metadata say, under the key ``nipq``, which tensors of the graph belong to which layer or product. They help to find
things; ``nipq.verify`` compares the tensors themselves.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nipq.errors import OrderError, require
from nipq.export.onnx_graph import QCDQ, QONNX, Binding, onnx_graph
from nipq.export.onnx_read import KEY, VERSION
from nipq.export.portable import PortableProduct, input_facts, portable_input, portable_products
from nipq.nn.deployed import Deployed, DeployedKeptLayer, DeployedLayer, deployed_layers
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.convert import deploy_copy
from nipq.prepare.layer_table import quantizers

#: Lowest versions of ONNX's operators that know 4-bit and 16-bit codes, and 2-bit codes; and the one of QONNX files.
OPSET, OPSET_INT2, OPSET_QONNX = 21, 25, 18
#: Version of the file itself, by that of the operators.
IR_VERSIONS = {OPSET_QONNX: 8, OPSET: 10, OPSET_INT2: 13}

#: Warnings of files: a batch that is fixed, packed weights, wide inputs.
FIXED_BATCH = "the model fixes the size of its batch itself: the file takes batches of the example's size only"
PACKED = (
    "packed INT4 weights: ONNX Runtime's faithful session computes the same at the same speed; OpenVINO runs these "
    "layers in floats instead of integers"
)
PACKED_INT2 = (
    f"packed INT2 weights need opset {OPSET_INT2}: OpenVINO cannot read them, and ONNX Runtime's default session may "
    "refuse the file; open it with nipq.export.runtimes.faithful_session"
)
WIDE = "inputs above 8 bits: ONNX Runtime computes these layers in floats, OpenVINO drops their quantizers"


def onnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs, *, pack: bool
) -> tuple[bytes, int, dict[str, str], tuple[str, ...]]:
    """The portable ONNX file.

    Args:
        deployed: a deployed model.
        example_inputs: its inputs.
        pack: store weights of up to 4 bits as INT4, and of 2 bits as INT2.

    Returns:
        The file, its opset, the type that each layer's weight codes are stored as, and warnings for its readers.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    layers = deployed_layers(deployed)
    containers = {name: _container(layer, pack=pack) for name, layer in layers.items()}
    opset = OPSET_INT2 if "int2" in containers.values() else OPSET
    model, bindings = onnx_graph(deployed, example_inputs, QCDQ, opset)
    for binding in bindings:
        if binding["name"] in layers:
            _pack(binding["weight"].producer().inputs[0], containers[binding["name"]])
    warnings = [text for kind, text in (("int4", PACKED), ("int2", PACKED_INT2)) if kind in containers.values()]
    products = portable_products(deployed)
    inputs = [given for layer in layers.values() if (given := portable_input(layer)) is not None]
    inputs += [given for operands in products.values() for given in operands.values()]
    if any(given.bits > 8 for given in inputs):
        warnings.append(WIDE)
    data = _written(model, bindings, layers, products, "qcdq", opset)
    return data, opset, containers, tuple(warnings + _batch_warning(model))


def qonnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs
) -> tuple[bytes, int, dict[str, str], tuple[str, ...]]:
    """The QONNX file, whose ``Quant`` nodes hold bit-widths as data; results and errors as of :func:`onnx_bytes`."""
    layers = deployed_layers(deployed)
    model, bindings = onnx_graph(deployed, example_inputs, QONNX, OPSET_QONNX)
    data = _written(model, bindings, layers, portable_products(deployed), "qonnx", OPSET_QONNX)
    return data, OPSET_QONNX, dict.fromkeys(layers, "float32"), tuple(_batch_warning(model))


@torch.no_grad()
def promised_bytes(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pack: bool = False,
    format: Literal["onnx", "qonnx"] = "onnx",
) -> int:
    """Bytes of the ONNX file that ``nipq.export`` will write of this model at its present bit-widths.

    They follow from the graph, the bit-widths and the kinds of grid, and not from a number that training moves, so the
    promise of an untrained model holds for the trained one. To try bit-widths: ``nipq.prepare.layer_table.set_bits_``
    on a copy. The one
    exception: float tensors outside of the quantized layers that turn out equal, number by number, are stored once, and
    the file is smaller by the other.

    Args:
        model: a prepared and calibrated model (bits still learned count as evaluation rounds them), or a deployed one.
        example_inputs: as for ``nipq.export``.
        pack: as for ``nipq.export``.
        format: ``"onnx"`` or ``"qonnx"``.

    Returns:
        Bytes on disk.

    Raises:
        OrderError: if the model is neither prepared nor deployed, or not calibrated.
        ConfigError: if the model cannot be traced.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    deployed = copy.deepcopy(model) if deployed_layers(model) else _deployed(model)
    _unlike(deployed)
    if format == "qonnx":
        return len(qonnx_bytes(deployed, example_inputs)[0])
    return len(onnx_bytes(deployed, example_inputs, pack=pack)[0])


def _deployed(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model):
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated clipping range, found none. "
                "Call nipq.calibrate_(model, loader): it chooses the grids, on which the size of an ONNX file depends."
            )
    return deploy_copy(model)


def _unlike(model: nn.Module) -> None:
    """Make float parameters and running statistics unequal, as training leaves them and fresh ones are not."""
    layers = set(deployed_layers(model).values())
    draws = torch.Generator().manual_seed(0)
    for module in model.modules():
        if module in layers:
            continue
        found: list[Tensor | None] = list(module._parameters.values())
        if isinstance(module, _NormBase):
            found += [module.running_mean, module.running_var]
        for tensor in found:
            if tensor is not None and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draws) + 0.5)


def _written(
    model: Any,  # noqa: ANN401  (the package that knows its type is optional)
    bindings: list[Binding],
    layers: dict[str, Deployed],
    products: dict[str, PortableProduct],
    form: str,
    opset: int,
) -> bytes:
    """The bytes of a file, with its metadata."""
    about: dict[str, Any] = {"format": form, "version": VERSION}
    about["layers"] = [_record(call, layers[call["name"]]) for call in bindings if call["name"] in layers]
    if products:
        calls = [call for call in bindings if call["name"] in products]
        about["products"] = [_product_record(call, products[call["name"]]) for call in calls]
    model.metadata_props[KEY] = _text(about).ljust(len(_text(_longest(about))))
    model.ir_version, model.producer_name, model.producer_version = IR_VERSIONS[opset], "nipq", producer()
    ir = require("onnx_ir", extra="onnx", purpose="ONNX files")
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data


def producer() -> str:
    """Versions of the packages on which the bytes of a file depend beside its model."""
    exporter = require("onnxscript", extra="onnx", purpose="ONNX files")
    return f"torch {torch.__version__}, onnxscript {exporter.__version__}"


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, separators=(",", ":"))


def _longest(value: Any) -> Any:  # noqa: ANN401  (any JSON)
    """Metadata with the most digits that zero points may have, so that a file's size does not depend on them."""
    if isinstance(value, list):
        return [_longest(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.get("grid") != "shifted":
        return {key: _longest(inner) for key, inner in value.items()}
    levels = 2 ** value["input_bits"] - 1
    return value | {"zero_point": levels, "code_low": -levels, "code_high": levels}


def _record(binding: Binding, layer: Deployed) -> dict[str, Any]:
    """Metadata of one call of a layer."""
    weight, bias = binding["weight"].producer().inputs, binding.get("bias")
    return {
        "name": binding["name"],
        "kind": layer.kind,
        "weight": weight[0].name,
        "weight_scale": binding.get("weight_scale", weight[1]).name,
        "bias": None if bias is None else bias.name,
        **_input_names(binding.get("codes")),
        "output": binding["output"].name,
        "weight_bits": layer.weight_bits,
        **input_facts(portable_input(layer)),
    } | ({"kept": True} if isinstance(layer, DeployedKeptLayer) else {})


def _product_record(binding: Binding, operands: PortableProduct) -> dict[str, Any]:
    """Metadata of one call of a product."""
    parts = {part: _input_names(binding[f"{part}.codes"]) | input_facts(given) for part, given in operands.items()}
    return {"name": binding["name"], **parts, "output": binding["output"].name}


def _input_names(codes: Any) -> dict[str, str | None]:  # noqa: ANN401  (as above)
    """Names of scale, zero point and codes: of the node that reads the codes, or of the Quant that is both in one."""
    if codes is None:
        return dict.fromkeys(("input_scale", "input_zero_point", "codes"))
    nodes = [codes.producer(), *(node for node, _ in codes.uses())]
    node = next(node for node in nodes if node.op_type in ("Quant", "DequantizeLinear"))
    return {"input_scale": node.inputs[1].name, "input_zero_point": node.inputs[2].name, "codes": codes.name}


def _container(layer: Deployed, *, pack: bool) -> str:
    if pack and layer.code_bits <= 4:
        return "int2" if layer.code_bits == 2 else "int4"
    changes_sign = isinstance(layer, DeployedLayer) and layer.code_bits > 8
    return "int16" if changes_sign or layer.weight_codes.dtype == torch.int16 else "int8"


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
