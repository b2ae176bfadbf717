"""Read an ONNX file as data, and match its nodes with layers and quantizers, without running anything.

Nothing outside the file is opened: tensors that say they lie elsewhere are refused before a runtime sees them. So are
loops, branches and operators from other domains, so that running a file takes as long as its layers do.

A layer is found from the name of its output backwards: the sum it makes, the stored weight and the quantizer before
it; so are both operands of a product inside attention. A Clip that is missing is therefore missing here, too, and a
weight is the one that the sum really reads, whatever the metadata claim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nipq.errors import FileFormatError, require
from nipq.prepare.layer_table import operand_point

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

#: The metadata's one key, and the version of what it holds.
KEY, VERSION = "nipq", 1
#: Longest file that the format can hold.
LONGEST = 2**31
#: The domain of QONNX's operators, and ONNX's own.
QONNX_DOMAIN = "qonnx.custom_op.general"
DOMAINS = ("", "ai.onnx", QONNX_DOMAIN)
#: Operators that only move numbers.
MOVES = frozenset(
    {"Pad", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Concat", "Slice", "Cast", "Identity", "Expand"}
)
#: Smallest and largest code of the containers, by ONNX's number of the type: (u)int8, (u)int16.
CONTAINERS = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767)}
#: Nodes to look at before giving up.
FAR = 64
#: Operators that read a layer's weight: sums of products and, of a table, its rows.
SUMS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})


class OnnxRecord(BaseModel):
    """Metadata of one call of a layer: the tensor to start from, and claimed bit-widths.

    Of a layer whose own forward is kept, weight and codes are found by their names, as anything may follow them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str
    output: str
    weight_bits: int
    input_bits: int | None = None
    kept: bool = False
    weight: str | None = None
    codes: str | None = None


class OperandRecord(BaseModel):
    """Metadata of an operand of a product."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    input_bits: int


class ProductRecord(BaseModel):
    """Metadata of one call of a product inside attention."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str
    output: str
    x: OperandRecord
    y: OperandRecord


class _About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    format: Literal["qcdq", "qonnx"]
    version: Literal[1]
    layers: Annotated[list[OnnxRecord], Field(max_length=100_000)]
    products: Annotated[list[ProductRecord], Field(max_length=100_000)] = []  # absent where there are none


@dataclass
class OnnxFile:
    """A file that was read, with its graph indexed by names.

    Attributes:
        path: where from.
        model: the parsed file.
        form: ``"qcdq"`` or ``"qonnx"``.
        records: calls of layers, in the order of the graph.
        products: calls of products inside attention, likewise.
        initialisers: stored tensors by name.
        producers: node by the name of each tensor that it makes.
        consumers: nodes by the name of each tensor that they read.
    """

    path: Path
    model: ModelProto
    form: Literal["qcdq", "qonnx"]
    records: list[OnnxRecord]
    products: list[ProductRecord]
    initialisers: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the graph."""
        self.initialisers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            self.producers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def error(self, name: str, expected: str, found: str) -> FileFormatError:
        """The error for what does not fit, with the layer's full name."""
        return FileFormatError(f"{self.path}: {name}: expected {expected}, found {found}. Export the model again.")

    def values(self, name: str, layer: str) -> Tensor:
        """A stored tensor of a layer by its name; whole numbers come as int32 at least, floats as they are.

        Raises:
            FileFormatError: if it is not stored, or damaged; names the layer.
        """
        if name not in self.initialisers:
            raise self.error(layer, f"the stored tensor {name!r}", "none")
        helper = require("onnx.numpy_helper", extra="onnx", purpose="reading ONNX files")
        try:
            array = helper.to_array(self.initialisers[name])
            return torch.from_numpy(array.copy() if array.dtype.kind == "f" else array.astype("int32"))
        except Exception as error:  # whatever NumPy thinks of a tensor that does not fit its own shape
            raise self.error(layer, f"the stored tensor {name!r} to be whole", str(error)) from error


def read_onnx(path: Path) -> OnnxFile:
    """Parse and check a file; no runtime is involved.

    Args:
        path: a file that ``nipq.export`` wrote.

    Returns:
        The file.

    Raises:
        FileFormatError: if it is missing, damaged, foreign, or could do more than compute.
        MissingDependencyError: if the package that reads ONNX is not installed.
    """
    onnx = require("onnx", extra="onnx", purpose="reading ONNX files")
    if not path.is_file():
        raise FileFormatError(f"{path}: expected an ONNX file, found none. Check the path.")
    if path.stat().st_size > LONGEST:
        raise FileFormatError(f"{path}: expected an ONNX file of at most {LONGEST:,} bytes, found more.")
    try:
        model: ModelProto = onnx.load_model_from_string(path.read_bytes())
        for node in model.graph.node:  # names may be no text at all, which shows only when they are looked at
            _ = (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
        _ = [part.name for part in (*model.graph.initializer, *model.graph.input, *model.graph.output)]
    except Exception as error:  # the parser's own error depends on which parser is installed
        raise FileFormatError(
            f"{path}: expected a whole ONNX file, found: {error}. Export or copy the model again."
        ) from error
    about = _about(path, model)
    _check_harmless(path, model)
    return OnnxFile(path, model, about.format, about.layers, about.products)


def _about(path: Path, model: ModelProto) -> _About:
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    try:
        values: Any = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: metadata: expected JSON, found {error}. Export the model again.") from error
    if not isinstance(values, dict):
        raise FileFormatError(
            f"{path}: expected an ONNX file that nipq.export wrote, found another one. Only those say which tensor "
            "belongs to which layer."
        )
    try:
        return _About.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise FileFormatError(
            f"{path}: metadata: expected {where}: {fault['msg']}, found {fault['input']!r}. Export the model again."
        ) from error


def _check_harmless(path: Path, model: ModelProto) -> None:
    """Refuse graphs that reach out of the file or can run for ever."""
    for node in model.graph.node:
        if node.domain not in DOMAINS:
            raise FileFormatError(f"{path}: expected operators of ONNX alone, found {node.domain}.{node.op_type}.")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise FileFormatError(f"{path}: expected operators without graphs inside, found a {node.op_type}.")
            for tensor in (attribute.t, *attribute.tensors, attribute.sparse_tensor.values):
                _check_inside(path, tensor)
    for tensor in _stored(model.graph):
        _check_inside(path, tensor)
    if model.functions:
        raise FileFormatError(f"{path}: expected no functions of its own, found {len(model.functions)}.")


def _stored(graph: GraphProto) -> list[TensorProto]:
    sparse = [part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices)]
    return [*graph.initializer, *sparse]


def _check_inside(path: Path, tensor: TensorProto) -> None:
    if tensor.external_data or tensor.data_location != 0:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        raise FileFormatError(
            f"{path}: {tensor.name}: expected a tensor inside the file, found one in {places}. "
            "Only files that hold all their tensors are read."
        )


@dataclass(frozen=True)
class Quantizer:
    """The nodes that put a tensor on levels, and their numbers.

    Attributes:
        nodes: from the float tensor to the one on levels, in order.
        codes: tensor that holds the whole codes; None in QONNX, which has none.
        facts: numbers by name, as ``nipq.verify`` expects them.
    """

    nodes: tuple[NodeProto, ...]
    codes: str | None
    facts: dict[str, Any]


def quantizer_before(file: OnnxFile, tensor: str, layer: str) -> Quantizer | None:
    """The quantizer of a tensor, or of the tensor that it is moved from; None if there is none.

    Raises:
        FileFormatError: if it is none that a file can have; names the layer or operand.
    """
    end = behind_moves(file, tensor, layer)
    if end is None:
        return None
    if end.op_type == "Quant":
        return Quantizer((end,), None, quant_facts(file, end, layer))
    nodes = [end]
    for kind in ("Clip", "QuantizeLinear", "Clip"):
        node = file.producers.get(nodes[0].input[0])
        if node is None or node.op_type != kind:
            continue
        if nodes[0].op_type != "QuantizeLinear" or _limits_codes(file, nodes[0]):
            nodes.insert(0, node)
    return Quantizer(tuple(nodes), end.input[0], _qcdq_facts(file, nodes, layer))


def behind_moves(file: OnnxFile, name: str, layer: str) -> NodeProto | None:
    """The DequantizeLinear or Quant behind a tensor, past nodes that only move numbers; None if there is none."""
    waiting, seen = [name], 0
    while waiting:
        seen += 1
        if seen > FAR:
            raise file.error(layer, f"its quantizer within {FAR} nodes", "none")
        node = file.producers.get(waiting.pop())
        if node is None:
            continue
        if node.op_type == "DequantizeLinear" or (node.op_type, node.domain) == ("Quant", QONNX_DOMAIN):
            if len(node.input) < (2 if node.op_type == "DequantizeLinear" else 4):
                raise file.error(layer, f"a whole {node.op_type}", f"{len(node.input)} inputs")
            return node
        if node.op_type in MOVES:
            waiting += node.input if node.op_type == "Concat" else node.input[:1]
    return None


def _limits_codes(file: OnnxFile, quantize: NodeProto) -> bool:
    """Return whether a Clip of floats before this node limits its codes (16 bits); other Clips are activations."""
    zero_point = file.initialisers.get(quantize.input[2]) if len(quantize.input) > 2 else None
    return zero_point is not None and zero_point.data_type in (4, 5)


def quant_facts(file: OnnxFile, node: NodeProto, layer: str) -> dict[str, Any]:
    """Numbers of a QONNX ``Quant`` node."""
    scale, zero_point, bits = (file.values(name, layer) for name in node.input[1:4])
    attributes = {attribute.name: attribute for attribute in node.attribute}
    rounding = attributes["rounding_mode"].s.decode() if "rounding_mode" in attributes else "ROUND"
    if bits.numel() != 1 or zero_point.numel() != 1 or not 2 <= float(bits) <= 16:
        raise file.error(layer, "one bit-width from 2 to 16 and one zero point", f"{bits.tolist()}"[:40])
    low, high = quant_range(node, int(bits))
    return {
        "step of the input": scale.reshape(-1),
        "zero point": int(zero_point),
        "lowest code": low,
        "highest code": high,
        "bits of the Quant": float(bits),
        "rounding": rounding,
    }


def quant_range(node: NodeProto, bits: int) -> tuple[int, int]:
    """Lowest and highest stored code of a QONNX ``Quant`` node of so many bits."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    signed, narrow = bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0))
    return (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1 - narrow)


def _qcdq_facts(file: OnnxFile, nodes: list[NodeProto], layer: str) -> dict[str, Any]:
    """Numbers of QuantizeLinear, Clip, DequantizeLinear."""
    quantize = next((node for node in nodes if node.op_type == "QuantizeLinear"), None)
    if quantize is None or len(quantize.input) < 3 or len(nodes[-1].input) < 3:
        raise file.error(layer, "QuantizeLinear and DequantizeLinear with zero points", f"{len(nodes)} nodes")
    scale, zero_point = (file.values(name, layer) for name in quantize.input[1:3])
    container = CONTAINERS.get(file.initialisers[quantize.input[2]].data_type)
    if container is None or zero_point.numel() != 1:
        raise file.error(layer, "one zero point of 8 or 16 bits", f"{zero_point.numel()} of another type")
    z = int(zero_point)
    facts = {"step of the input": scale.reshape(-1), "zero point": z, "codes": f"{container[0]} to {container[1]}"}
    for place, key in ((0, "lowest code"), (1, "highest code")):
        limits = list(_limits(file, nodes, place + 1, layer, scale, z))
        facts[key] = (min if place else max)([container[place], *limits], key=float)
    after = [file.values(name, layer) for name in nodes[-1].input[1:3]]
    facts["same scale and zero point behind the codes"] = torch.equal(after[0], scale) and torch.equal(
        after[1], zero_point
    )
    return facts


def _limits(
    file: OnnxFile, nodes: list[NodeProto], place: int, layer: str, scale: Tensor, zero_point: int
) -> Iterator[int | float]:
    """Bounds that the Clips set, as codes; a float bound that is no level comes as a fraction of one."""
    for node in nodes:
        if node.op_type == "Clip" and len(node.input) > place and node.input[place]:
            bound = file.values(node.input[place], layer)
            if bound.numel() != 1:
                raise file.error(layer, "a Clip with one bound", f"{bound.numel()}")
            if not bound.is_floating_point():
                yield int(bound)
                continue
            code = float(torch.round(bound / scale).nan_to_num(posinf=2**31, neginf=-(2**31)).flatten()[0])
            exact = torch.equal((torch.tensor(code) * scale).flatten(), bound.flatten())
            yield zero_point + (int(code) if exact else float(bound.double() / scale.double()))


@dataclass(frozen=True)
class MatchedLayer:
    """One call of a layer in a graph, or one operand of a call of a product.

    Attributes:
        name: full name of the layer, or the operand's quantization point.
        quantizer: nodes from the float input to the quantized one, in order; empty when the input stays float.
        codes: tensor that holds the whole codes; None when the input stays float, or in QONNX, which has none.
        stored: stored tensor of the weight's codes; None for an operand of a product.
        source: tensor that goes into the quantizer, or into the sum if there is none; empty if it is not known.
        total: node that sums, or looks up.
        output: tensor that leaves the layer or the product.
        facts: numbers by name, as ``nipq.verify`` expects them.
    """

    name: str
    quantizer: tuple[NodeProto, ...]
    codes: str | None
    stored: str | None
    source: str
    total: NodeProto
    output: str
    facts: dict[str, Any]


def matched_layers(file: OnnxFile) -> list[MatchedLayer]:
    """Match every call of a layer with its nodes, in the order of the graph.

    Raises:
        FileFormatError: if a layer is not found, with its full name.
    """
    return [_matched(file, record) for record in file.records]


def matched_operands(file: OnnxFile) -> list[MatchedLayer]:
    """Match both operands of every call of a product inside attention with their nodes, in the order of the graph.

    Raises:
        FileFormatError: if a product is not found, with its full name.
    """
    return [operand for record in file.products for operand in _product(file, record)]


def _product(file: OnnxFile, record: ProductRecord) -> list[MatchedLayer]:
    total = file.producers.get(record.output)
    if total is None or total.op_type != "MatMul" or len(total.input) != 2:
        found = "nothing" if total is None else f"a {total.op_type}"
        raise file.error(record.name, f"a product that makes {record.output!r}", found)
    parts = zip(("x", "y"), total.input, (record.x, record.y), strict=True)
    return [
        _reading(file, operand_point(record.name, part), data, None, total, record.output, {}, about.input_bits)
        for part, data, about in parts
    ]


def _kept(file: OnnxFile, record: OnnxRecord) -> MatchedLayer:
    """A layer whose own forward is kept."""
    weight = _dequantizer(file, record.weight, record.name)
    if weight.input[0] not in file.initialisers:
        raise file.error(record.name, "a weight that is stored in whole codes", "none")
    facts = {"weight bits": record.weight_bits} | _weight_facts(file, weight, [], record.name) | {"bias": None}
    reader = next(iter(file.consumers.get(weight.output[0], ())), weight)
    if record.codes is None:
        return MatchedLayer(record.name, (), None, weight.input[0], "", reader, record.output, facts)
    levels = _dequantizer(file, record.codes, record.name).output[0]
    return _reading(file, record.name, levels, weight.input[0], reader, record.output, facts, record.input_bits)


def _dequantizer(file: OnnxFile, name: str | None, layer: str) -> NodeProto:
    """The node that puts a tensor of codes on its levels, or made the levels themselves."""
    made: list[NodeProto] = [node for node in (file.producers.get(name or ""),) if node is not None]
    for node in (*made, *file.consumers.get(name or "", ())):
        if node.op_type in ("DequantizeLinear", "Quant") and len(node.input) > 1:
            found: NodeProto = node
            return found
    raise file.error(layer, f"codes named {name!r}", "none")


def _matched(file: OnnxFile, record: OnnxRecord) -> MatchedLayer:
    if record.kept:
        return _kept(file, record)
    total, scales, biases = _sum_before(file, record)
    data, weight = _sum_inputs(file, total, record.name)
    facts = {"weight bits": record.weight_bits} | _weight_facts(file, weight, scales, record.name)
    parts = [file.values(name, record.name).reshape(-1) for name in [*total.input[2:3], *biases] if name]
    facts["bias"] = sum(parts[1:], parts[0]) if parts else None
    return _reading(file, record.name, data, weight.input[0], total, record.output, facts, record.input_bits)


def _reading(
    file: OnnxFile,
    name: str,
    data: str,
    stored: str | None,
    total: NodeProto,
    output: str,
    facts: dict[str, Any],
    bits: int | None,
) -> MatchedLayer:
    """A layer or operand with the quantizer before its input."""
    quantizer = quantizer_before(file, data, name)
    if quantizer is None:
        while data in file.producers and file.producers[data].op_type == "Pad":
            data = file.producers[data].input[0]
        return MatchedLayer(name, (), None, stored, data, total, output, facts)
    facts |= quantizer.facts | {"input bits": bits}
    return MatchedLayer(
        name, quantizer.nodes, quantizer.codes, stored, quantizer.nodes[0].input[0], total, output, facts
    )


def _sum_before(file: OnnxFile, record: OnnxRecord) -> tuple[NodeProto, list[str], list[str]]:
    """The node that sums, and the stored factors and summands between it and the layer's output."""
    factors: list[str] = []
    summands: list[str] = []
    name = record.output
    for _ in range(FAR):
        node = file.producers.get(name)
        if node is None or node.op_type in SUMS:
            break
        stored = {other: found for other in node.input if (found := _stored_behind(file, other)) is not None}
        if node.op_type in ("Mul", "Add") and len(stored) == 1:
            (factors if node.op_type == "Mul" else summands).extend(stored.values())
            name = next((other for other in node.input if other not in stored), record.output)
        elif node.op_type in MOVES and node.input:
            name = node.input[0]
        else:
            break
    node = file.producers.get(name)
    if node is None or node.op_type not in SUMS or len(node.input) < 2:
        found = "nothing" if node is None else f"a {node.op_type}"
        raise file.error(record.name, f"a layer before its output {record.output!r}", found)
    return node, factors, summands


def _stored_behind(file: OnnxFile, name: str) -> str | None:
    """The stored tensor that a tensor is, or is moved from; None if it is computed."""
    for _ in range(FAR):
        if name in file.initialisers or name not in file.producers:
            break
        node = file.producers[name]
        if node.op_type not in MOVES or node.op_type == "Concat" or not node.input:
            break
        name = node.input[0]
    return name if name in file.initialisers else None


def _sum_inputs(file: OnnxFile, total: NodeProto, layer: str) -> tuple[str, NodeProto]:
    """The tensor that is summed over, and the node that dequantizes the stored weight."""
    places = {"MatMul": ((0, 1), (1, 0)), "Gather": ((1, 0),)}.get(total.op_type, ((0, 1),))
    for data, weight in places:
        node = behind_moves(file, total.input[weight], layer)
        if node is not None and node.input[0] in file.initialisers:
            return total.input[data], node
    raise file.error(layer, "a weight that is stored in whole codes", "none")


def _weight_facts(file: OnnxFile, node: NodeProto, factors: list[str], layer: str) -> dict[str, Any]:
    stored, scale = file.values(node.input[0], layer), file.values(node.input[1], layer)
    if node.op_type == "Quant":
        facts = quant_facts(file, node, layer)
        codes = torch.round(stored / scale)
        on_levels = torch.equal(codes * scale, stored)
        limits = (facts["lowest code"], facts["highest code"])
        inside = bool(((codes >= limits[0]) & (codes <= limits[1])).all())
        return {
            "weight codes": codes,
            "weight scale": scale,
            "bits of the weight's Quant": facts["bits of the Quant"],
        } | ({"weight on its levels": on_levels and inside})
    for name in factors:
        scale = scale * file.values(name, layer).reshape(-1)
    facts = {"weight codes": stored, "weight scale": scale}
    if len(node.input) > 2 and node.input[2]:
        facts["zero point of the weight"] = int(file.values(node.input[2], layer).abs().max())
    return facts
