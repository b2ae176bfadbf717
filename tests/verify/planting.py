"""Exported files to plant something in, and what a proof says of them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nipq.verify import VerifyResult

onnx = pytest.importorskip("onnx")
numpy_helper = onnx.numpy_helper


def checks(result: VerifyResult) -> dict[str, bool]:
    return {check.name[:2]: check.passed for check in result.checks}


def first(result: VerifyResult, name: str) -> str:
    return str(next(check.first_difference for check in result.checks if check.name.startswith(name)))


class Graph:
    """An ONNX file to plant something in."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.nodes = self.model.graph.node
        self.stored = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def value(self, name: str) -> Any:
        return numpy_helper.to_array(self.stored[name]).copy()

    def put(self, name: str, value: Any) -> None:
        self.stored[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    def own(self, node: Any, place: int, value: Any) -> None:
        """Let a node read a number of its own: equal numbers are stored once."""
        node.input[place] = f"own_{len(self.stored)}"
        tensor = numpy_helper.from_array(np.asarray(value), node.input[place])
        self.model.graph.initializer.append(tensor)
        self.stored[tensor.name] = self.model.graph.initializer[-1]

    def node(self, kind: str, reads: str) -> Any:
        """The node of that kind that reads a tensor."""
        return next(node for node in self.nodes if node.op_type == kind and reads in node.input)

    def makes(self, name: str) -> Any:
        return next(node for node in self.nodes if name in node.output)

    def reads(self, name: str) -> list[Any]:
        return [node for node in self.nodes if name in node.input]

    def insert(self, before: Any, *nodes: Any) -> None:
        kept = list(self.nodes)
        place = kept.index(before)
        kept[place:place] = nodes
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del self.nodes[:]
        self.nodes.extend(copies)


def rewritten(path: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive with changed members."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.infolist():
            copy.writestr(zipfile.ZipInfo(entry.filename), change(entry.filename, source.read(entry)))
    return target


def array_changed(name: str, change: Callable[[Any], Any]) -> Callable[[str, bytes], bytes]:
    def at(member: str, data: bytes) -> bytes:
        if member != f"{name}.npy":
            return data
        file = io.BytesIO()
        np.save(file, change(np.load(io.BytesIO(data))))
        return file.getvalue()

    return at
