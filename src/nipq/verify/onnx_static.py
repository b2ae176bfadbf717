"""Rung E0 of an ONNX file: every stored number against the trained one, and how many bytes the weights take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.export.modules import Deployed
from nipq.export.onnx_cells import Cell
from nipq.export.onnx_file_export import FIXED_BATCH, onnx_bytes, producer, qonnx_bytes
from nipq.export.onnx_file_verify import OnnxFile
from nipq.export.portable import PortableInput, PortableLayer
from nipq.nn.kinds import along_channels
from nipq.prepare.trace import ExampleInputs
from nipq.verify.static import differences

#: ONNX's numbers of the types that share bytes.
PACKED_TYPES = frozenset({21, 22, 25, 26})
#: Bits of a stored element, by ONNX's number of its type.
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 11: 64, 21: 4, 22: 4, 25: 2, 26: 2}


def onnx_differences(cells: Sequence[Cell], expected: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Every number of the file that is not the trained one, bit for bit.

    Args:
        cells: layers of the file, and operands of products.
        expected: what a file must hold of each of them, in the order of execution.

    Yields:
        One sentence per difference, with the layer's full name.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.name, []).append(cell)
    for name in [*expected, *(name for name in by_name if name not in expected)]:
        if name not in by_name or name not in expected:
            yield f"{name}: only the {'trained model' if name in expected else 'file'} quantizes it"
            continue
        for cell in by_name[name]:
            facts = _comparable(cell.facts, expected[name])
            yield from differences(name, expected[name], facts, "trained", "in the file")


def expected_facts(layer: Deployed, numbers: PortableLayer, form: str) -> dict[str, Any]:
    """What a file of the given form must hold of a layer.

    Args:
        layer: deployed from the trained model.
        numbers: the same in the form that files hold.
        form: ``"qcdq"`` or ``"qonnx"``.
    """
    facts: dict[str, Any] = {
        "weight bits": numbers.weight_bits,
        "weight codes": numbers.weight,
        "weight scale": numbers.weight_scale,
        "bias": numbers.bias,
    }
    if form == "qonnx":
        facts["weight scale"] = along_channels(numbers.weight_scale, layer.layer, numbers.weight)
        facts |= {"bits of the weight's Quant": float(numbers.weight_bits), "weight on its levels": True}
    return facts if numbers.input is None else facts | input_facts(numbers.input, form)


def input_facts(given: PortableInput, form: str) -> dict[str, Any]:
    """What a file of the given form must hold of a layer's input, or of an operand.

    Args:
        given: its numbers.
        form: ``"qcdq"`` or ``"qonnx"``.
    """
    facts: dict[str, Any] = {
        "step of the input": given.scale.reshape(-1),
        "zero point": given.zero_point,
        "lowest code": given.low,
        "highest code": given.high,
        "input bits": given.bits,
    }
    if form == "qonnx":
        return facts | {"bits of the Quant": float(given.bits), "rounding": "ROUND"}
    info = torch.iinfo(given.dtype)
    return facts | {"codes": f"{info.min} to {info.max}", "same scale and zero point behind the codes": True}


def weight_bytes(file: OnnxFile, numbers: Mapping[str, PortableLayer], form: str) -> tuple[int, int]:
    """Bytes of the weights: promised by their bit-widths, found in the file; each stored tensor once.

    Args:
        file: the file.
        numbers: layers in the form that files hold.
        form: ``"qcdq"``, promised in 8 or 16 bits, or ``"qonnx"``, in floats as that format wants it.

    Returns:
        ``(promised, found)``; less is found in a packed file.
    """
    weights = [given.weight for given in numbers.values()]
    if form == "qonnx":  # levels of tied weights differ where their layers' scales were rounded
        promised = sum(4 * weight.numel() for weight in weights)
    else:
        promised = sum(weight.nbytes for weight in {weight.data_ptr(): weight for weight in weights}.values())
    stored = {node.input[0] for node in file.model.graph.node if _makes_weight(file, node.op_type, node.input)}
    found = 0
    for name in stored:
        tensor = file.initialisers[name]
        count = 1
        for size in tensor.dims:
            count *= size
        found += -(-count * ELEMENT_BITS.get(tensor.data_type, 64) // 8)
    return promised, found


def promised_file(file: OnnxFile, deployed: nn.Module, example: ExampleInputs) -> int | None:
    """Bytes that the whole file should have: those that an export of the trained model has here and now.

    Args:
        file: the file.
        deployed: what ``nipq.convert`` makes of the trained model.
        example: one batch.

    Returns:
        Bytes; None if they cannot be known: other versions of the exporter wrote the file, or its batch is fixed.
    """
    if file.model.producer_version != producer():
        return None
    pack = any(tensor.data_type in PACKED_TYPES for tensor in file.initialisers.values())
    try:
        data, *_, warnings = (
            qonnx_bytes(deployed, example) if file.form == "qonnx" else onnx_bytes(deployed, example, pack=pack)
        )
    except ConfigError:
        return None  # exported elsewhere, from a form of the model that can be traced
    return None if FIXED_BATCH in warnings else len(data)


def _makes_weight(file: OnnxFile, kind: str, inputs: Sequence[str]) -> bool:
    return kind in ("DequantizeLinear", "Quant") and inputs[0] in file.initialisers


def _comparable(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """One number for all channels spread over them; what is 0 and not promised left out."""
    facts = {key: value for key, value in found.items() if key in expected or value not in (0, None)}
    for key, value in facts.items():
        wanted = expected.get(key)
        if isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.numel() == 1 != wanted.numel():
            facts[key] = value.reshape(-1).expand(wanted.shape)
        elif isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.numel() == wanted.numel() == 1:
            facts[key] = value.reshape(wanted.shape)
    return facts
