"""Which nodes of an ONNX graph are which layer, and what numbers they hold.

A layer is found from the name of its output backwards: the sum it makes, the stored weight and the quantizer before
it; so are both operands of a product inside attention. A Clip that is missing is therefore missing here, too, and a
weight is the one that the sum really reads, whatever the file says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nipq.export.onnx_file_verify import OnnxFile, OnnxRecord, ProductRecord
from nipq.export.onnx_quantizer import FAR, MOVES, behind_moves, quant_facts, quantizer_before
from nipq.prepare.places import place_of

if TYPE_CHECKING:
    from onnx import NodeProto

#: Operators that read a layer's weight: sums of products and, of a table, its rows.
SUMS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})


@dataclass(frozen=True)
class Cell:
    """One call of a layer in a graph, or one operand of a call of a product.

    Attributes:
        name: full name of the layer, or the operand's place.
        quantizer: nodes from the float input to the quantized one, in order; empty when the input stays float.
        codes: tensor that holds the whole codes; None when the input stays float, or in QONNX, which has none.
        stored: stored tensor of the weight's codes; None for an operand of a product.
        source: tensor that goes into the quantizer, or into the sum if there is none.
        total: node that sums, or looks up.
        output: tensor that leaves the layer or the product.
        facts: numbers by name, as in :func:`nipq.verify.onnx_static.expected_facts`.
    """

    name: str
    quantizer: tuple[NodeProto, ...]
    codes: str | None
    stored: str | None
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


def operands(file: OnnxFile) -> list[Cell]:
    """Both operands of every call of a product inside attention.

    Args:
        file: a file that was read.

    Returns:
        Two cells for each call, in the order of the graph.

    Raises:
        FileFormatError: if a product is not found, with its full name.
    """
    return [cell for record in file.products for cell in _product(file, record)]


def _product(file: OnnxFile, record: ProductRecord) -> list[Cell]:
    total = file.producers.get(record.output)
    if total is None or total.op_type != "MatMul" or len(total.input) != 2:
        found = "nothing" if total is None else f"a {total.op_type}"
        raise file.error(record.name, f"a product that makes {record.output!r}", found)
    parts = zip(("x", "y"), total.input, (record.x, record.y), strict=True)
    return [
        _reading(file, place_of(record.name, part), data, None, total, record.output, {}, about.input_bits)
        for part, data, about in parts
    ]


def _cell(file: OnnxFile, record: OnnxRecord) -> Cell:
    total, scales, biases = _sum_before(file, record)
    data, weight = _operands(file, total, record.name)
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
) -> Cell:
    """A cell with the quantizer before what its sum reads."""
    quantizer = quantizer_before(file, data, name)
    if quantizer is None:
        while data in file.producers and file.producers[data].op_type == "Pad":
            data = file.producers[data].input[0]
        return Cell(name, (), None, stored, data, total, output, facts)
    facts |= quantizer.facts | {"input bits": bits}
    return Cell(name, quantizer.nodes, quantizer.codes, stored, quantizer.nodes[0].input[0], total, output, facts)


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
