"""Which nodes of an ONNX graph are which layer, and what numbers they hold.

A layer is found from the name of its output backwards: the sum it makes, the stored weight and the quantizer before
it. So a Clip that is missing is missing here, too, and a weight is the one that the sum really reads, whatever the file
says of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nipq.verify.onnx_file import QONNX_DOMAIN, OnnxFile, OnnxRecord

if TYPE_CHECKING:
    from onnx import NodeProto

#: Operators that read a layer's weight: sums of products and, of a table, its rows; and those that only move numbers.
SUMS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})
MOVES = frozenset(
    {"Pad", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Concat", "Slice", "Cast", "Identity", "Expand"}
)
#: Smallest and largest code of the containers, by ONNX's number of the type: (u)int8, (u)int16.
CONTAINERS = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767)}
#: Nodes to look at before giving up.
FAR = 64


@dataclass(frozen=True)
class Cell:
    """One call of a layer in a graph.

    Attributes:
        name: full name of the layer.
        quantizer: nodes from the float input to the quantized one, in order; empty when the input stays float.
        codes: tensor that holds the whole codes; None when the input stays float, or in QONNX, which has none.
        source: tensor that goes into the quantizer, or into the sum if there is none.
        total: node that sums, or looks up.
        output: tensor that leaves the layer.
        facts: numbers by name, as in :func:`nipq.verify.onnx_static.expected_facts`.
    """

    name: str
    quantizer: tuple[NodeProto, ...]
    codes: str | None
    source: str
    total: NodeProto
    output: str
    facts: dict[str, Any]


def cells(file: OnnxFile) -> list[Cell]:
    """Every call of a layer.

    Args:
        file: a file that was read.

    Returns:
        Cells in the order of the graph.

    Raises:
        FileFormatError: if a layer is not found, with its full name.
    """
    return [_cell(file, record) for record in file.records]


def _cell(file: OnnxFile, record: OnnxRecord) -> Cell:
    total, scales, biases = _sum_before(file, record)
    data, weight = _operands(file, total, record.name)
    facts = {"weight bits": record.weight_bits} | _weight_facts(file, weight, scales, record.name)
    parts = [file.values(name, record.name).reshape(-1) for name in [*total.input[2:3], *biases] if name]
    facts["bias"] = sum(parts[1:], parts[0]) if parts else None
    end = _behind_moves(file, data, record.name)
    if end is None:
        source = data
        while source in file.producers and file.producers[source].op_type == "Pad":
            source = file.producers[source].input[0]
        return Cell(record.name, (), None, source, total, record.output, facts)
    nodes = [end]
    if end.op_type == "Quant":
        facts |= _quant_facts(file, end, record.name)
        codes = None
    else:
        for kind in ("Clip", "QuantizeLinear", "Clip"):
            node = file.producers.get(nodes[0].input[0])
            if node is None or node.op_type != kind:
                continue
            if nodes[0].op_type != "QuantizeLinear" or _limits_codes(file, nodes[0]):
                nodes.insert(0, node)
        facts |= _qcdq_facts(file, nodes, record.name)
        codes = end.input[0]
    facts["input bits"] = record.input_bits
    return Cell(record.name, tuple(nodes), codes, nodes[0].input[0], total, record.output, facts)


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


def _operands(file: OnnxFile, total: NodeProto, layer: str) -> tuple[str, NodeProto]:
    """The tensor that is summed over, and the node that makes the weight from what is stored."""
    places = {"MatMul": ((0, 1), (1, 0)), "Gather": ((1, 0),)}.get(total.op_type, ((0, 1),))
    for data, weight in places:
        node = _behind_moves(file, total.input[weight], layer)
        if node is not None and node.input[0] in file.initialisers:
            return total.input[data], node
    raise file.error(layer, "a weight that is stored in whole codes", "none")


def _behind_moves(file: OnnxFile, name: str, layer: str) -> NodeProto | None:
    """The node that dequantizes or quantizes what a tensor is made of by moving it only; None if there is none."""
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
    """Whether a Clip of floats before this node is its own: so it is with 16 bits; other Clips are activations."""
    zero_point = file.initialisers.get(quantize.input[2]) if len(quantize.input) > 2 else None
    return zero_point is not None and zero_point.data_type in (4, 5)


def _weight_facts(file: OnnxFile, node: NodeProto, factors: list[str], layer: str) -> dict[str, Any]:
    stored, scale = file.values(node.input[0], layer), file.values(node.input[1], layer)
    if node.op_type == "Quant":
        facts = _quant_facts(file, node, layer)
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


def _quant_facts(file: OnnxFile, node: NodeProto, layer: str) -> dict[str, Any]:
    """Numbers of a QONNX ``Quant`` node."""
    scale, zero_point, bits = (file.values(name, layer) for name in node.input[1:4])
    attributes = {attribute.name: attribute for attribute in node.attribute}
    signed = "signed" not in attributes or bool(attributes["signed"].i)
    narrow = "narrow" in attributes and bool(attributes["narrow"].i)
    rounding = attributes["rounding_mode"].s.decode() if "rounding_mode" in attributes else "ROUND"
    if bits.numel() != 1 or zero_point.numel() != 1 or not 2 <= float(bits) <= 16:
        raise file.error(layer, "one bit-width from 2 to 16 and one zero point", f"{bits.tolist()}"[:40])
    width = int(bits)
    low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0, 2**width - 1 - narrow)
    return {
        "step of the input": scale.reshape(-1),
        "zero point": int(zero_point),
        "lowest code": low,
        "highest code": high,
        "bits of the Quant": float(bits),
        "rounding": rounding,
    }


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
