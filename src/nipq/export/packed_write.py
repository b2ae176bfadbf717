"""Write a packed file: safetensors with bit-planes, float32 scales, and everything else the model needs.

Every quantized weight is one uint8 tensor of bit-planes (:mod:`nipq.functional.packing`), beside float32 ``scale``,
``offset`` and ``input_step``; what stays float is stored as it is. The metadata hold one entry, JSON with a record of
each layer and each product inside attention, padded with spaces to the length that the header would have if every
number in it were as long as it can be. So::

    bytes on disk = fixed_bytes + sum of bits * ceil(N / 8) over the weights

holds for every assignment of bits: a budget promises the bytes on disk exactly. Equal models make equal files. The
JSON holds the SHA-256 of the whole file (with zeros in its own place), so that no changed byte goes unnoticed. Nothing
in a file is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.files import check_free, written_whole
from nipq.functional.grid import Grid
from nipq.functional.packing import MOST_BITS, pack, payload_bytes
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedProduct,
    check_deployed,
    deploy_state,
    deployed_layers,
    deployed_products,
    full_name,
)
from nipq.prepare.convert import bare_model, deploy_copy

#: Name of the format in the metadata, and its version.
FORMAT, FORMAT_VERSION = "nipq-packed", 3
#: The metadata's one key.
KEY = "nipq"

#: Placeholder of the checksum while it is computed.
NO_CHECKSUM = "0" * 64

#: The longest that an input's record can be.
_LONGEST_INPUT = {"bits": MOST_BITS, "grid": "unsigned", "zero_point": 65535}

#: Types that a file holds, in the order in which safetensors lays them out.
_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACE = {dtype: place for place, dtype in enumerate(_CODES)}


def save(deployed: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a deployed model to one file, whole or not at all.

    Args:
        deployed: a model from ``nipq.convert`` or ``nipq.load``.
        path: the file, by custom ``*.nipq.safetensors``.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        ConfigError: if the file exists and ``overwrite`` is not given, its folder does not exist, the model holds no
            deployed layer, or it holds state that no file can.
    """
    path, deployed = Path(path), bare_model(deployed, "save")
    check_free(path, overwrite=overwrite, command="save")
    tensors, metadata = contents(deployed)
    data = with_checksum(to_bytes(tensors, metadata))
    assert len(data) == file_bytes(deployed), "the header's length is computed as safetensors writes it"
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
    return path


def file_bytes(deployed: nn.Module) -> int:
    """Bytes that :func:`save` writes, without writing them.

    Args:
        deployed: a deployed model.

    Returns:
        Bytes, the same as the file's size.

    Raises:
        ConfigError: as :func:`save`.
    """
    deployed = bare_model(deployed, "save")
    sizes = [(layer.weight_codes.numel(), layer.weight_bits) for layer in _owners(deployed).values()]
    return _fixed_bytes(deployed) + sum(payload_bytes(count, bits) for count, bits in sizes)


def fixed_bytes(model: nn.Module) -> int:
    """Bytes of a prepared model's file other than its bit-planes: header, scales, offsets, what stays float.

    Args:
        model: a prepared model, frozen or not.

    Returns:
        Bytes; they do not depend on any bit-width.

    Raises:
        OrderError: if the model is not prepared.
        ConfigError: if it holds state that no file can.
    """
    return _fixed_bytes(deploy_copy(model))


def contents(deployed: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file.

    Args:
        deployed: a deployed model.

    Returns:
        ``(tensors, metadata)`` as safetensors takes them, with :data:`NO_CHECKSUM` for :func:`with_checksum`
        to replace.

    Raises:
        ConfigError: if the model holds no deployed layer, or state that no file can.
    """
    tensors = {key: value.cpu().contiguous().clone() for key, value in _other_tensors(deployed).items()}
    for name, layer in _owners(deployed).items():
        tensors[full_name(name, "planes")] = torch.from_numpy(
            pack(layer.weight_codes.cpu().numpy(), layer.weight_bits, Grid(layer.weight_grid))
        )
    records = {name: _record(layer) for name, layer in deployed_layers(deployed).items()}
    text = _text(records, {name: _product_record(product) for name, product in deployed_products(deployed).items()})
    missing = _longest_header(deployed) - header_bytes(tensors, {KEY: text})
    return tensors, {KEY: text + " " * missing}


def with_checksum(data: bytes) -> bytes:
    """Put the checksum in the place of :data:`NO_CHECKSUM`, which :func:`contents` left for it."""
    place = data.index(NO_CHECKSUM.encode())
    return data[:place] + checksum(data, place).encode() + data[place + len(NO_CHECKSUM) :]


def checksum(data: bytes, place: int) -> str:
    """SHA-256, in hexadecimal, of a file as if the checksum that stands at this place were zeros."""
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[:place], NO_CHECKSUM.encode(), view[place + len(NO_CHECKSUM) :]):
        digest.update(part)
    return digest.hexdigest()


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Length of the JSON header that safetensors writes, before it is padded to a multiple of 8.

    Of the tensors only names, types and shapes matter.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_PLACE[item[1].dtype], item[0])):
        start, end = end, end + tensor.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return len(_json(header).encode())


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _text(layers: Mapping[str, Mapping[str, Any]], products: Mapping[str, Any]) -> str:
    try:
        release = version("nipq")
    except PackageNotFoundError:  # run from the source tree
        release = "unknown"
    about = {"format": FORMAT, "version": FORMAT_VERSION, "nipq": release, "sha256": NO_CHECKSUM}
    return _json({**about, "layers": layers} | ({"products": products} if products else {}))


def _record(layer: Deployed) -> dict[str, Any]:
    """Metadata of a layer."""
    record: dict[str, Any] = {"kind": layer.kind, "bits": layer.weight_bits, "shape": list(layer.weight_codes.shape)}
    if layer.weight_grid != "signed":
        record["grid"] = layer.weight_grid
    if layer.tied_to is not None:
        record["tied_to"] = layer.tied_to
    if layer.like.dtype != torch.float32:
        record["dtype"] = str(layer.like.dtype).removeprefix("torch.")
    if isinstance(layer, DeployedKeptLayer):
        record["kept"] = True
    elif not isinstance(layer, DeployedLayer):
        return record | {"bias": layer.offset is not None}
    if layer.batchnorm is not None:
        record["batchnorm"] = layer.batchnorm
    if layer.input_bits is None:
        return record
    return record | {"input": {"bits": layer.input_bits, "grid": layer.grid, "zero_point": layer.zero_point}}


def _product_record(product: DeployedProduct) -> dict[str, dict[str, Any]]:
    """Metadata of a product; its steps are among the tensors."""
    return {
        name: {"bits": operand.bits, "grid": operand.grid, "zero_point": operand.zero_point}
        for name, operand in product.operands().items()
    }


def _owners(deployed: nn.Module) -> dict[str, Deployed]:
    """Layers whose planes the file holds: all but those with another one's weight."""
    return {name: layer for name, layer in deployed_layers(deployed).items() if layer.tied_to is None}


def _other_tensors(deployed: nn.Module) -> dict[str, Tensor]:
    """Everything in the file but the bit-planes."""
    check_deployed(deployed, "save")
    state = deploy_state(deployed)
    for key, value in state.items():
        found = getattr(value, "dtype", type(value).__name__)  # a module's extra state may be anything
        if found not in _CODES:
            raise ConfigError(
                f"{key}: expected a tensor of a plain type in the model's state, found {found}. "
                "Convert it, or register the buffer with persistent=False."
            )
    return state


def _fixed_bytes(deployed: nn.Module) -> int:
    header = -(-_longest_header(deployed) // 8) * 8
    return 8 + header + sum(tensor.nbytes for tensor in _other_tensors(deployed).values())


def _longest_header(deployed: nn.Module) -> int:
    """Length of the header if every bit-width, grid and zero point were as long as it can be.

    Weights that are symmetric as they have 8 bits, in a model where others are balanced, count as balanced ones.
    """
    records = {name: _record(layer) | {"bits": MOST_BITS} for name, layer in deployed_layers(deployed).items()}
    other = next((record["grid"] for record in records.values() if "grid" in record), None)
    for record in records.values():
        if other is not None:
            record["grid"] = other
        if "input" in record:
            record["input"] = _LONGEST_INPUT
    tensors = {key: value.to("meta") for key, value in _other_tensors(deployed).items()}
    for name, layer in _owners(deployed).items():
        shape = (MOST_BITS, payload_bytes(layer.weight_codes.numel(), 1))
        tensors[full_name(name, "planes")] = torch.empty(shape, dtype=torch.uint8, device="meta")
    products = {name: dict.fromkeys("xy", _LONGEST_INPUT) for name in deployed_products(deployed)}
    return header_bytes(tensors, {KEY: _text(records, products)})
