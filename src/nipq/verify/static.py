"""ZIP archives as data: members in memory, never on the disk, and never longer than the file itself.

Rung E0: what lies in the deployed model, and in its file, against what was trained. Nothing is run.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export.modules import (
    Deployed,
    DeployedLayer,
    DeployedProduct,
    deploy_state,
    deployed_layers,
    deployed_products,
    full_name,
)
from nipq.nn.integer import bias_of, fold
from nipq.nn.kinds import output_channels
from nipq.nn.layers import float_weight
from nipq.prepare.layer_table import OPERANDS, LayerRow, layer_table, weight_table

#: Times the promised size that a file may have before it is refused unread.
TIMES_PROMISED = 4
#: Bytes that a small file may have anyhow.
ANYHOW = 2**20


def members(data: bytes, path: Path) -> dict[str, bytes]:
    """What an archive holds.

    Args:
        data: the archive.
        path: where from, for messages.

    Returns:
        Contents by name.

    Raises:
        FileFormatError: if it is damaged, compressed, or claims to hold more than it is long.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not plain or sum(entry.file_size for entry in entries) > len(data):
                raise FileFormatError(
                    f"{path}: expected an archive that is stored as it is, found a compressed or overlapping one. "
                    "Export the model again."
                )
            found = {entry.filename: archive.read(entry) for entry in entries}
    except FileFormatError:
        raise
    except Exception as error:  # the module answers damage with many kinds of error
        raise FileFormatError(
            f"{path}: expected a whole archive, found: {error}. Export or copy the model again."
        ) from error
    if len(found) < len(entries):
        raise FileFormatError(f"{path}: expected every name once, found some twice. Export the model again.")
    return found


def read(path: Path, promised: int) -> bytes:
    """A file that is not far longer than it should be.

    Args:
        path: the file.
        promised: bytes that it should have.

    Returns:
        Its bytes.

    Raises:
        FileFormatError: if it is missing or too long.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a file, found none. Check the path.")
    longest = TIMES_PROMISED * promised + ANYHOW
    if path.stat().st_size > longest:
        raise FileFormatError(f"{path}: expected about {promised:,} bytes, found {path.stat().st_size:,}.")
    return path.read_bytes()


def trained_differences(model: nn.Module, deployed: nn.Module) -> Iterator[str]:
    """Every number of the deployed model that is not that of the trained one, bit for bit.

    Args:
        model: prepared and trained, bits frozen.
        deployed: made from it.

    Yields:
        One sentence per difference, in the order of execution, with the layer's full name.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = deployed_layers(deployed)
    rows = {names[row.layer]: row for row, _ in weight_table(model)}
    for name, row in rows.items():
        if name not in layers:
            yield f"{name}: the trained model quantizes this layer, the deployed one does not"
        else:
            yield from differences(name, trained_facts(row), deployed_facts(layers[name]))
    for name in layers.keys() - rows.keys():
        yield f"{name}: the deployed model quantizes this layer, the trained one does not"
    products = deployed_products(deployed)
    trained = {names[row.layer]: row for row in layer_table(model) if row.spec.is_product}
    for name in dict.fromkeys((*trained, *products)):
        ours = {} if name not in trained else _trained_operands(trained[name])
        theirs = {} if name not in products else _deployed_operands(products[name])
        yield from differences(name, ours, theirs)
    rows |= trained
    gone = [*rows, *(names[row.batchnorm] for row in rows.values() if row.input and row.batchnorm)]
    found = _outside([*rows, *layers, *products], deploy_state(deployed))
    yield from differences("", _outside(gone, model.state_dict()), found)


def file_differences(deployed: nn.Module, loaded: nn.Module) -> Iterator[str]:
    """Every number of a model read from its file that is not that of the model that was saved, bit for bit.

    Args:
        deployed: what was saved.
        loaded: what came back.

    Yields:
        One sentence per difference, with the layer's full name.
    """
    saved, back = deployed_layers(deployed), deployed_layers(loaded)
    for name in sorted(saved.keys() ^ back.keys()):
        yield f"{name}: only one of the deployed model and its file has this layer"
    for name in saved.keys() & back.keys():
        yield from differences(name, deployed_facts(saved[name]), deployed_facts(back[name]), "saved", "in the file")
    products, again = deployed_products(deployed), deployed_products(loaded)
    for name in dict.fromkeys((*products, *again)):
        one, other = (_deployed_operands(part[name]) if name in part else {} for part in (products, again))
        yield from differences(name, one, other, "saved", "in the file")
    ours, theirs = (_outside([*saved, *back], deploy_state(part)) for part in (deployed, loaded))
    yield from differences("", ours, theirs, "saved", "in the file")


def _trained_operands(row: LayerRow) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for part, quantizer in zip(OPERANDS, (row.input, row.weight), strict=True):
        assert quantizer is not None
        low, high = quantizer.code_range()
        whole = (quantizer.bits_rounded, int(quantizer.zero_point()), int(low), int(high))
        facts |= _operand(part, quantizer.step(), quantizer.grid.kind, whole)
    return facts


def _deployed_operands(product: DeployedProduct) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for part, operand in product.operands().items():
        whole = (operand.bits, operand.zero_point, operand.code_low, operand.code_high)
        facts |= _operand(part, operand.step, operand.grid, whole)
    return facts


def _operand(part: str, step: Tensor, grid: str, whole: tuple[int, int, int, int]) -> dict[str, Any]:
    names = ("bits", "zero point", "lowest code", "highest code")
    return {f"{part}: step": step, f"{part}: grid": grid} | {
        f"{part}: {name}": number for name, number in zip(names, whole, strict=True)
    }


def trained_facts(row: LayerRow) -> dict[str, Any]:
    """What a trained layer's deployed twin must hold, taken from its quantizers."""
    bias = bias_of(row.layer)
    facts: dict[str, Any] = {
        "weight bits": row.weight.bits_rounded,
        "weight codes": row.weight.codes(float_weight(row.layer)),
    }
    if row.input is None:
        return facts | {"step of the weight": row.weight.step(), "bias": bias}
    step, (low, high) = row.input.step(), row.input.code_range()
    scale, offset = fold(step, row.weight.step(), bias, row.batchnorm, output_channels(row.layer))
    return facts | {
        "input bits": row.input.bits_rounded,
        "grid of the input": row.input.grid.kind,
        "zero point": int(row.input.zero_point()),
        "lowest code": int(low),
        "highest code": int(high),
        "step of the input": step,
        "scale": scale,
        "offset": offset,
    }


def deployed_facts(layer: Deployed) -> dict[str, Any]:
    """The same as :func:`trained_facts`, as the deployed layer holds it."""
    facts: dict[str, Any] = {"weight bits": layer.weight_bits, "weight codes": layer.weight_codes}
    if not isinstance(layer, DeployedLayer):
        return facts | {"step of the weight": layer.scale, "bias": layer.offset}
    return facts | {
        "input bits": layer.input_bits,
        "grid of the input": layer.grid,
        "zero point": layer.zero_point,
        "lowest code": layer.code_low,
        "highest code": layer.code_high,
        "step of the input": layer.input_step,
        "scale": layer.scale,
        "offset": layer.offset,
    }


def _outside(names: list[str], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the state holds beyond the named modules."""
    prefixes = tuple(full_name(name, "") for name in names)
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and not key.startswith(prefixes)}


def differences(
    name: str, expected: Mapping[str, Any], found: Mapping[str, Any], first: str = "trained", second: str = "deployed"
) -> Iterator[str]:
    """Every fact that two sides do not share, bit for bit.

    Args:
        name: full name of the layer they are about, or nothing.
        expected: facts of one side.
        found: facts of the other.
        first: what the one side is called.
        second: what the other is called.

    Yields:
        One sentence per difference.
    """
    where = f"{name}: " if name else ""
    for key in [*expected, *(key for key in found if key not in expected)]:
        if key not in expected or key not in found:
            yield f"{where}{key}: only {first if key in expected else second}"
            continue
        a, b = expected[key], found[key]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            text = _tensor_difference(a.detach(), b.detach().to(a.device))
            if text:
                yield f"{where}{key}: {text} ({first} against {second})"
        elif a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            yield f"{where}{key}: {first} {a}, {second} {b}"


def _tensor_difference(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    wide = torch.promote_types(a.dtype, b.dtype)
    differs = a.to(wide) != b.to(wide)
    if not bool(differs.any()):
        return None
    ours, theirs = (values[differs][0].item() for values in (a, b))
    return f"{int(differs.sum()):,} of {a.numel():,} differ, the first {ours:.9g} against {theirs:.9g}"
