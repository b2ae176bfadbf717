"""OpenVINO: integer kernels on CPUs for layers of up to 8 bits, from the portable ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nipq.errors import FileFormatError, require
from nipq.runtime.compiled import CompiledModel, Kernel
from nipq.verify.onnx_cells import Cell, cells
from nipq.verify.onnx_file import OnnxFile, read_onnx

#: Kinds of node in OpenVINO's execution graph that sum products.
SUMS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
#: Types of what an integer kernel reads.
INTEGERS = frozenset({"u8", "i8"})
#: Without it a CPU that knows bfloat16 computes every float part in it, which moves codes.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenVinoModel(CompiledModel):
    """An ONNX file compiled by OpenVINO.

    Args:
        compiled: an ``openvino.CompiledModel``.
        kernels: how each layer is computed.
        warnings: what differs from the deployed model.
    """

    def __init__(self, compiled: Any, kernels: Sequence[Kernel], warnings: Sequence[str]) -> None:  # noqa: ANN401
        super().__init__("OpenVINO", kernels, warnings)
        self.compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:  # noqa: ANN401  (the model's own arguments)
        """All outputs; one that is alone as it is.

        Args:
            *args: the model's arguments; whatever is no tensor lies in the graph.
            **kwargs: the same by name.
        """
        given: dict[Any, Any] = dict(enumerate(value for value in args if isinstance(value, Tensor)))
        given |= {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
        feed = {key: value.detach().cpu().numpy() for key, value in given.items()}
        outputs = [torch.from_numpy(np.array(value)) for value in self.compiled(feed).values()]
        return outputs[0] if len(outputs) == 1 else outputs


def openvino_model(path: str | Path, *, threads: int | None = None, strict: bool = True) -> OpenVinoModel:
    """Compile a portable ONNX file for the CPU, in integers wherever its layers allow.

    Float parts are computed in float32. Which layers run in integers is read off the runtime's own execution graph.

    Args:
        path: what ``nipq.export(deployed, "model.onnx", ...)`` wrote.
        threads: threads of one inference; as many as the machine has cores if not given.
        strict: refuse a model with a layer of at most 8 bits that the runtime computes in floats. Layers that read the
            same tensor as another layer are excused, as OpenVINO computes those in floats; ``warnings`` names them.

    Returns:
        A module that is called like the model, with ``kernels`` and ``warnings``.

    Raises:
        ConfigError: if ``strict`` and such a layer is found, by its name.
        FileFormatError: if the file is not one of ours, or OpenVINO cannot read it.
        MissingDependencyError: if OpenVINO, or the package that reads ONNX, is not installed.
    """
    openvino = require("openvino", extra="openvino", purpose="integer kernels from OpenVINO")
    path = Path(path)
    file = read_onnx(path)
    found = cells(file)
    marks = _named_after_layers(found)
    settings: dict[str, Any] = dict(PRECISION)
    if threads is not None:
        settings |= {"INFERENCE_NUM_THREADS": threads}
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(file.model.SerializeToString()), "CPU", settings)
    except Exception as error:  # the runtime raises plain RuntimeErrors
        raise FileFormatError(
            f"{path}: expected an ONNX file that OpenVINO can compile, found: {error}. "
            "Export it as .onnx, without packing."
        ) from error
    model = OpenVinoModel(compiled, _kernels(compiled, found, marks), _warnings(file, found))
    if strict:
        model.check_integer()
    return model


def _named_after_layers(found: Sequence[Cell]) -> dict[str, str]:
    """Give the node that sums a name of its own, which comes back in the execution graph: name by mark."""
    marks = {}
    for number, cell in enumerate(found):
        mark = f"nipq_layer_{number}_"
        marks[mark] = cell.name
        cell.total.name = mark
    return marks


def _kernels(compiled: Any, found: Sequence[Cell], marks: Mapping[str, str]) -> list[Kernel]:  # noqa: ANN401
    """One kernel for each call of a layer."""
    seen: dict[str, tuple[str, str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}
        if facts.get("layerType") not in SUMS:
            continue
        for original in facts.get("originalLayersNames", "").split(","):
            mark = original.split("/")[0]
            if mark in marks:
                seen[mark] = facts.get("runtimePrecision", "?"), facts.get("primitiveType", "?")
    readers = Counter(cell.source for cell in found)
    kernels = []
    for cell, mark in zip(found, marks, strict=True):
        precision, primitive = seen.get(mark, ("?", "not found in the execution graph"))
        narrow = bool(cell.quantizer) and cell.facts["weight bits"] <= 8 and (cell.facts["input bits"] or 99) <= 8
        expected = narrow and readers[cell.source] == 1
        kernels.append(Kernel(cell.name, f"{precision} {primitive}", precision in INTEGERS, expected))
    return kernels


def _warnings(file: OnnxFile, found: Sequence[Cell]) -> list[str]:
    """What OpenVINO does otherwise."""
    warnings = []
    claimed = [record.input_bits for record in file.records]
    readers = Counter(cell.source for cell in found)
    for cell, bits in zip(found, claimed, strict=True):
        if bits is not None and not cell.quantizer:
            warnings.append(
                f"{cell.name}: its input is not quantized with a whole zero point; OpenVINO rounds a shift to one, and "
                "the result differs"
            )
        elif bits is not None and bits > 8:
            warnings.append(f"{cell.name}: OpenVINO drops the quantizer of {bits}-bit inputs, and the result differs")
        elif cell.quantizer and readers[cell.source] > 1:
            warnings.append(f"{cell.name}: reads the same tensor as another layer and may run in floats")
    return warnings
