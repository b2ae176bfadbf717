"""The quantizer before a tensor of an ONNX graph, be it a layer's input or an operand, and what numbers it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nipq.export.onnx_file_verify import QONNX_DOMAIN, OnnxFile

if TYPE_CHECKING:
    from onnx import NodeProto

#: Operators that only move numbers.
MOVES = frozenset(
    {"Pad", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Concat", "Slice", "Cast", "Identity", "Expand"}
)
#: Smallest and largest code of the containers, by ONNX's number of the type: (u)int8, (u)int16.
CONTAINERS = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767)}
#: Nodes to look at before giving up.
FAR = 64


@dataclass(frozen=True)
class Quantizer:
    """What makes a tensor one on levels.

    Attributes:
        nodes: from the float tensor to the one on levels, in order.
        codes: tensor that holds the whole codes; None in QONNX, which has none.
        facts: numbers by name, as in :func:`nipq.verify.onnx_static.input_facts`.
    """

    nodes: tuple[NodeProto, ...]
    codes: str | None
    facts: dict[str, Any]


def quantizer_before(file: OnnxFile, tensor: str, layer: str) -> Quantizer | None:
    """The quantizer of a tensor.

    Args:
        file: a file that was read.
        tensor: the tensor on levels, or one that is made of it by moving it only.
        layer: full name of the layer or operand, for messages.

    Returns:
        The quantizer; None if there is none.

    Raises:
        FileFormatError: if it is none that a file can have.
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


def quant_facts(file: OnnxFile, node: NodeProto, layer: str) -> dict[str, Any]:
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
