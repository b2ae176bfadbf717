"""The packed file: safetensors with bit-planes, float32 scales, and everything else the model needs.

Every quantized weight is one uint8 tensor of bit-planes (:mod:`nipq.functional.packing`), beside float32 ``scale``,
``offset`` and ``input_step``; what stays float is stored as it is. The metadata say in JSON what each layer is. The header
is padded to the length that it would have if every number in it were as long as it can be, hence::

    bytes on disk = fixed_bytes + sum of bits * ceil(N / 8) over the weights

for every assignment of bits: what a budget promises is what lies on disk, to the byte. Nothing in the file is executed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nipq.deploy.convert import deploy_copy
from nipq.deploy.modules import Deployed, DeployedLayer, deploy_state, deployed_layers, full_name
from nipq.errors import ConfigError
from nipq.functional.packing import pack, payload_bytes

FORMAT, FORMAT_VERSION = "nipq-packed", 1

#: The longest that the numbers of a layer's record can be; the header is padded to the length they would give it.
_LONGEST = {"bits": 16, "grid": "unsigned", "zero_point": 65535}

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(deployed: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a deployed model to one file, whole or not at all.

    Args:
        deployed: what ``nipq.convert`` or ``nipq.load`` returned.
        path: the file, by custom ``*.nipq.safetensors``.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        ConfigError: if the file exists and ``overwrite`` is not given, its folder does not exist, or the model holds no
            deployed layer.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"save: {path} exists. Choose another name, or pass overwrite=True to replace it.")
    if not path.parent.is_dir():
        raise ConfigError(f"save: expected the folder {path.parent} to exist. Create it first.")
    tensors, metadata = contents(deployed)
    data = to_bytes(tensors, metadata)
    assert len(data) == file_bytes(deployed), "the header's length is computed as safetensors writes it"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def file_bytes(deployed: nn.Module) -> int:
    """Bytes that :func:`save` writes, without writing them.

    Args:
        deployed: a deployed model.

    Returns:
        Bytes, the same as the file's size.
    """
    layers = _stored_once(deployed)
    return fixed_bytes_of(deployed) + sum(payload_bytes(w.weight.numel(), w.weight_bits) for w in layers.values())


def fixed_bytes(model: nn.Module) -> int:
    """Bytes of a prepared model's file other than its bit-planes: header, scales, offsets, what stays float.

    Args:
        model: a prepared model, frozen or not.

    Returns:
        Bytes; they do not depend on any bit-width.
    """
    return fixed_bytes_of(deploy_copy(model))


def fixed_bytes_of(deployed: nn.Module) -> int:
    """:func:`fixed_bytes` of a model that is deployed already."""
    rest = sum(tensor.numel() * tensor.element_size() for tensor in _plain_tensors(deployed).values())
    return 8 + _padded_header_bytes(deployed) + rest


def contents(deployed: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file.

    Args:
        deployed: a deployed model.

    Returns:
        ``(tensors, metadata)`` as safetensors takes them.

    Raises:
        ConfigError: if the model holds no deployed layer.
    """
    if not deployed_layers(deployed):
        raise ConfigError(
            f"{type(deployed).__name__}: expected a deployed model, found no deployed layer. "
            "Call nipq.convert(model) first."
        )
    tensors = _plain_tensors(deployed)
    for name, layer in _stored_once(deployed).items():
        tensors[full_name(name, "planes")] = torch.from_numpy(pack(layer.weight.cpu().numpy(), layer.weight_bits))
    metadata = _metadata(records(deployed))
    shapes = {key: (_DTYPES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    metadata["pad"] = " " * (_worst_header_bytes(deployed) - header_bytes(shapes, metadata))
    return tensors, metadata


def records(deployed: nn.Module) -> dict[str, dict[str, Any]]:
    """What the metadata say of each layer, by name."""
    first: dict[int, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, layer in deployed_layers(deployed).items():
        planes = first.setdefault(id(layer.weight), name)
        record: dict[str, Any] = {"bits": layer.weight_bits, "shape": list(layer.weight.shape), "planes": planes}
        if isinstance(layer, DeployedLayer):
            record["input"] = {"bits": layer.input_bits, "grid": layer.grid, "zero_point": layer.zero_point}
            record["batchnorm"] = layer.batchnorm
        else:
            record["bias"] = layer.has_bias
        found[name] = record
    return found


def header_bytes(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Length of the JSON header that safetensors writes, before it is padded to a multiple of 8.

    Args:
        shapes: type code and shape of each tensor, by name.
        metadata: text by name.

    Returns:
        Bytes.
    """
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # safetensors lays tensors out by falling alignment, then by name.
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-sizes[item[1][0]], item[0])):
        start, end = end, end + sizes[dtype] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


# ------------------------------------------------------------------------------- parts


def _stored_once(deployed: nn.Module) -> dict[str, Deployed]:
    """Layers whose planes the file holds: of layers with a tied weight the first."""
    first: dict[int, str] = {}
    layers = deployed_layers(deployed)
    return {name: layer for name, layer in layers.items() if first.setdefault(id(layer.weight), name) == name}


def _plain_tensors(deployed: nn.Module) -> dict[str, Tensor]:
    """Everything but the bit-planes, each tensor in storage of its own."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in deploy_state(deployed).items()}


def _metadata(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "nipq": version("nipq"),
        "layers": json.dumps(layers, separators=(",", ":"), ensure_ascii=False),
        "pad": "",
    }


def _worst_header_bytes(deployed: nn.Module) -> int:
    """Length of the header if every bit-width, grid and zero point were as long as it can be."""
    layers = records(deployed)
    for record in layers.values():
        record["bits"] = _LONGEST["bits"]
        if "input" in record:
            record["input"] = dict(_LONGEST)
    shapes = {key: (_DTYPES[value.dtype], tuple(value.shape)) for key, value in deploy_state(deployed).items()}
    for name, layer in _stored_once(deployed).items():
        shapes[full_name(name, "planes")] = ("U8", (16, payload_bytes(layer.weight.numel(), 1)))
    return header_bytes(shapes, _metadata(layers))


def _padded_header_bytes(deployed: nn.Module) -> int:
    return -(-_worst_header_bytes(deployed) // 8) * 8
