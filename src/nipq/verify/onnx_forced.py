"""The same ONNX graph with every layer's input replaced by the trained one, so that a layer answers for itself only.

Each layer gets a copy of its quantizer that reads an input of its own; its sum reads the copy. The quantizer that was
there stays and reads what arrives from the layers before, which is how the cut includes the next quantizer. QONNX's
``Quant`` is first written out in operators that ONNX Runtime knows, as its definition says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nipq.errors import require
from nipq.export.onnx_cells import Cell
from nipq.export.onnx_file_verify import QONNX_DOMAIN, OnnxFile

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_FLOAT, _INT64 = 1, 7

#: Any message of the format.
Message = TypeVar("Message", "ModelProto", "NodeProto")


@dataclass(frozen=True)
class Probe:
    """Where one call of a layer, of a product or of one of its operands can be watched in the forced graph.

    Attributes:
        name: full name of the layer or product, or the operand's place.
        forced: input of the graph that takes the place of the layer's; None of a product, whose operands have one each.
        arrived: whole codes of what came from the layers before; None when the input stays float.
        codes: whole codes of the forced input; None when it stays float.
        output: the output of the layer or product; None of an operand.
        zero_point: stored code of the value 0.
    """

    name: str
    forced: str | None = None
    arrived: str | None = None
    codes: str | None = None
    output: str | None = None
    zero_point: int = 0


def runnable(file: OnnxFile) -> ModelProto:
    """The file's graph in operators of ONNX alone.

    Args:
        file: a file that was read.

    Returns:
        A copy.
    """
    model = _copy(file.model)
    nodes = [node for given in model.graph.node for node in _written_out(file, given)]
    _replace(model.graph, nodes)
    for place, entry in enumerate(model.opset_import):
        if entry.domain == QONNX_DOMAIN:
            del model.opset_import[place]
            break
    return model


def forced(file: OnnxFile, layers: Sequence[Cell], operands: Sequence[Cell]) -> tuple[ModelProto, list[Probe]]:
    """The graph for rung E1.

    Args:
        file: a file that was read.
        layers: its layers.
        operands: operands of its products.

    Returns:
        The graph, and a probe for each cell and each product.
    """
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    model = _copy(file.model)
    nodes, probes = list(model.graph.node), []
    for number, cell in enumerate([*layers, *operands]):
        given, kind = f"nipq_forced_{number}", _INT64 if cell.total.op_type == "Gather" else _FLOAT
        model.graph.input.append(helper.make_tensor_value_info(given, kind, None))
        renamed = {cell.source: given}
        at = len(nodes)
        if cell.quantizer:
            last = cell.quantizer[-1].output[0]
            copies = [_renamed(node, renamed, f"nipq_{number}_") for node in cell.quantizer]
            at = next(i for i, node in enumerate(nodes) if last in node.output) + 1
            nodes[at:at] = copies
            at, renamed = at + len(copies), {last: copies[-1].output[0]}
        else:
            at = next((i for i, node in enumerate(nodes) if cell.source in node.output), -1) + 1
        own = _before(nodes[at:], cell.output)
        for node in nodes[at:]:
            if cell.quantizer or node.output[0] in own:
                _rename_inputs(node, renamed)
        arrived = _codes_of(cell)
        copied = None if arrived is None else f"nipq_{number}_{arrived}"
        output, zero_point = cell.output if number < len(layers) else None, int(cell.facts.get("zero point", 0))
        probes.append(Probe(cell.name, given, arrived, copied, output, zero_point))
    probes += [Probe(record.name, output=record.output) for record in file.products]
    _replace(model.graph, [written for node in nodes for written in _written_out(file, node)])
    _watch(file, model, probes)
    for place, entry in enumerate(model.opset_import):
        if entry.domain == QONNX_DOMAIN:
            del model.opset_import[place]
            break
    return model, probes


def _codes_of(cell: Cell) -> str | None:
    """The tensor of whole codes; a ``Quant`` is given one when it is written out."""
    if not cell.quantizer:
        return None
    return cell.codes or _codes_name(cell.quantizer[-1].output[0])


def _codes_name(quantized: str) -> str:
    return f"{quantized}_codes"


def _before(nodes: list[NodeProto], output: str) -> set[str]:
    """Names made on the way back from a layer's output to its sum, the sum's own among them."""
    producers = {name: node for node in nodes for name in node.output}
    waiting, found = [output], set()
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is None or name in found:
            continue
        found.add(name)
        waiting += node.input
    return found


def _renamed(node: NodeProto, renamed: dict[str, str], prefix: str) -> NodeProto:
    """A copy whose outputs have names of their own, and whose inputs are the copies before it."""
    twin = _copy(node)
    _rename_inputs(twin, renamed)
    for place, name in enumerate(node.output):
        renamed[name] = twin.output[place] = prefix + name
    twin.name = prefix + node.name
    return twin


def _rename_inputs(node: NodeProto, renamed: dict[str, str]) -> None:
    for place, name in enumerate(node.input):
        node.input[place] = renamed.get(name, name)


def _written_out(file: OnnxFile, node: NodeProto) -> list[NodeProto]:
    """A ``Quant`` as ``(clip(round(x / scale + zero point)) - zero point) * scale``; any other node as it is."""
    if node.domain != QONNX_DOMAIN:
        return [node]
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    x, scale, zero_point, bits = node.input
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    width = int(file.values(bits, node.output[0]))
    signed, narrow = bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0))
    low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0, 2**width - 1 - narrow)
    y = node.output[0]
    bounds = [
        helper.make_node("Constant", [], [f"{y}_{name}"], value_float=float(value))
        for name, value in (("low", low), ("high", high))
    ]
    steps: list[tuple[str, list[str], str]] = [
        ("Div", [x, scale], f"{y}_divided"),
        ("Add", [f"{y}_divided", zero_point], f"{y}_shifted"),
        ("Round", [f"{y}_shifted"], f"{y}_rounded"),
        ("Clip", [f"{y}_rounded", f"{y}_low", f"{y}_high"], _codes_name(y)),
        ("Sub", [_codes_name(y), zero_point], f"{y}_whole"),
        ("Mul", [f"{y}_whole", scale], y),
    ]
    return [*bounds, *(helper.make_node(kind, inputs, [output]) for kind, inputs, output in steps)]


def _watch(file: OnnxFile, model: ModelProto, probes: list[Probe]) -> None:
    """Make what the probes look at outputs of the graph."""
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    known = {value.name for value in model.graph.output}
    for probe in probes:
        for name, original in ((probe.arrived, probe.arrived), (probe.codes, probe.arrived), (probe.output, None)):
            if name is None or name in known:
                continue
            known.add(name)
            kind = _FLOAT if original is None else _type_of(file, original)
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))


def _type_of(file: OnnxFile, codes: str) -> int:
    """ONNX's number of the type of codes: that of the zero point they are read with, or float in QONNX."""
    reader = next((node for node in file.consumers.get(codes, ()) if node.op_type == "DequantizeLinear"), None)
    return _FLOAT if reader is None else file.initialisers[reader.input[2]].data_type


def _replace(graph: GraphProto, nodes: list[NodeProto]) -> None:
    kept = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _copy(message: Message) -> Message:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
