"""An ONNX file as data: read without running anything, and refused if it could do more than compute.

Nothing outside the file is opened: tensors that say they lie elsewhere are refused before a runtime sees them. So are
loops, branches and operators from other domains, so that running a file takes as long as its layers do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nipq.errors import FileFormatError, require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

#: The metadata's one key, and the version of what it holds.
KEY, VERSION = "nipq", 1
#: Longest file that the format can hold.
LONGEST = 2**31
#: The domain of QONNX's operators, and ONNX's own.
QONNX_DOMAIN = "qonnx.custom_op.general"
DOMAINS = ("", "ai.onnx", QONNX_DOMAIN)


class OnnxRecord(BaseModel):
    """What the metadata say of one call of a layer, as far as it is believed: where to look, and what is claimed."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str
    output: str
    weight_bits: int
    input_bits: int | None = None


class OperandRecord(BaseModel):
    """What they claim of an operand of a product."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    input_bits: int


class ProductRecord(BaseModel):
    """What they say of one call of a product inside attention."""

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
    """A file that was read.

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
        """A stored tensor; whole numbers come as int32 at least, floats as they are.

        Args:
            name: of the initialiser.
            layer: full name of the layer, for messages.

        Returns:
            The tensor.

        Raises:
            FileFormatError: if it is not stored, or damaged.
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
        path: what ``nipq.export`` wrote.

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
    """Refuse what reaches out of the file, and what can run for ever."""
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
