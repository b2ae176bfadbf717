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
from nipq.export.onnx_read import MatchedLayer, OnnxFile, matched_layers, matched_operands, read_onnx
from nipq.export.program import call_arguments
from nipq.export.runtimes import CompiledModel, Kernel
from nipq.prepare.batches import ExampleInputs

#: Kinds of node in OpenVINO's execution graph that sum products.
SUMS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
#: Kind of node that chains of small linear layers become.
FUSED = "Subgraph"
#: Input types of integer kernels.
INTEGERS = frozenset({"u8", "i8"})
#: Without it a CPU that knows bfloat16 computes every float part in it, which moves codes.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenVinoModel(CompiledModel):
    """An ONNX file compiled by OpenVINO, once for each shape of its inputs.

    Args:
        path: the file, for messages.
        graph: the file's contents.
        settings: of the runtime.
        found: its layers.
        example_inputs: its inputs; compiled for their shapes now.
        warnings: differences from the deployed model.
    """

    def __init__(
        self,
        path: Path,
        graph: bytes,
        settings: Mapping[str, Any],
        found: Sequence[MatchedLayer],
        example_inputs: ExampleInputs,
        warnings: Sequence[str],
    ) -> None:
        super().__init__("OpenVINO", (), warnings)
        openvino = require("openvino", extra="openvino", purpose="integer kernels from OpenVINO")
        self.path, self.graph, self.settings, self.core = path, graph, dict(settings), openvino.Core()
        self.programs: dict[tuple[tuple[int, ...], ...], Any] = {}
        args, kwargs = call_arguments(example_inputs)
        self.kernels = tuple(_kernels(self.program(self._tensors(args, kwargs)), found))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:  # noqa: ANN401  (the model's own arguments)
        """All outputs; one that is alone as it is. Another batch size compiles again.

        Args:
            *args: the model's arguments; whatever is no tensor lies in the graph.
            **kwargs: the same by name.
        """
        given = self._tensors(args, kwargs)
        feed = {key: value.detach().cpu().numpy() for key, value in given.items()}
        outputs = [torch.from_numpy(np.array(value)) for value in self.program(given)(feed).values()]
        return outputs[0] if len(outputs) == 1 else outputs

    def program(self, given: Mapping[int | str, Tensor]) -> Any:  # noqa: ANN401  (the package that knows is optional)
        """The compiled form for the shapes of some inputs.

        Args:
            given: tensors by place or name.

        Raises:
            FileFormatError: if OpenVINO cannot compile the file for them.
        """
        shapes = tuple(tuple(value.shape) for value in given.values())
        if shapes not in self.programs:
            try:
                model = self.core.read_model(self.graph)
                # With an open batch size OpenVINO 2026.4 overwrites tensors that a residual sum has yet to read.
                model.reshape({key: list(value.shape) for key, value in given.items()})
                self.programs[shapes] = self.core.compile_model(model, "CPU", self.settings)
            except Exception as error:  # the runtime raises plain RuntimeErrors
                raise FileFormatError(
                    f"{self.path}: expected an ONNX file that OpenVINO can compile for inputs of shape {shapes}, "
                    f"found: {error}. Export it as .onnx, without packing."
                ) from error
        return self.programs[shapes]

    def _tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Tensor]:
        given: dict[int | str, Tensor] = dict(enumerate(value for value in args if isinstance(value, Tensor)))
        return given | {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}


def openvino_model(
    path: str | Path, example_inputs: ExampleInputs, *, threads: int | None = None, strict: bool = True
) -> OpenVinoModel:
    """Compile a portable ONNX file for the CPU, in integers wherever its layers allow.

    Float parts are computed in float32. Which layers run in integers is read off the runtime's own execution graph.

    Args:
        path: a file that ``nipq.export(deployed, "model.onnx", ...)`` wrote.
        example_inputs: its inputs; compiled for this batch size now, for others when they come.
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
    require("openvino", extra="openvino", purpose="integer kernels from OpenVINO")
    file = read_onnx(Path(path))
    found = matched_layers(file)
    for number, layer in enumerate(found):
        layer.total.name = _mark(number)
    settings = PRECISION | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    graph = file.model.SerializeToString()
    model = OpenVinoModel(file.path, graph, settings, found, example_inputs, _warnings(file, found))
    if strict:
        model.check_integer()
    return model


def _mark(number: int) -> str:
    """A name for the node that sums, which comes back in the execution graph."""
    return f"nipq_layer_{number}_"


def _kernels(compiled: Any, found: Sequence[MatchedLayer]) -> list[Kernel]:  # noqa: ANN401
    """One kernel for each call of a layer."""
    # A fused kernel may be named after the node or after the tensor that leaves the layer.
    marks = {_mark(number): number for number in range(len(found))}
    marks |= {layer.output: number for number, layer in enumerate(found)}
    # Where a layer's last factor was moved behind a residual sum its kernel has a name of the runtime's own.
    calls = Counter(layer.stored for layer in found)
    weights = {layer.stored: number for number, layer in enumerate(found) if calls[layer.stored] == 1}
    seen: dict[int, tuple[str, str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}
        kind, known = facts.get("layerType"), (facts.get("runtimePrecision", "?"), facts.get("primitiveType", "?"))
        if kind in SUMS and node.get_input_size() > 1:
            number = weights.get(node.input_value(1).get_node().get_friendly_name())
            if number is not None:
                seen[number] = known
        for original in facts.get("originalLayersNames", "").split(","):
            head, _, tail = original.partition("/")
            number = marks.get(original, marks.get(head))
            if number is not None and kind in SUMS:
                seen[number] = known
            elif number is not None and kind == FUSED and not tail.endswith("DequantizationMultiply"):
                seen.setdefault(number, known)
    readers = Counter(layer.source for layer in found)
    kernels = []
    for number, layer in enumerate(found):
        precision, primitive = seen.get(number, ("?", "not found in the execution graph"))
        narrow = bool(layer.quantizer) and layer.facts["weight bits"] <= 8 and (layer.facts["input bits"] or 99) <= 8
        expected = narrow and readers[layer.source] == 1
        kernels.append(Kernel(layer.name, f"{precision} {primitive}", precision in INTEGERS, expected))
    return kernels


def _warnings(file: OnnxFile, found: Sequence[MatchedLayer]) -> list[str]:
    """Differences of OpenVINO's results from the deployed model."""
    warnings = []
    claimed = [record.input_bits for record in file.records]
    readers = Counter(layer.source for layer in found)
    for layer, bits in zip(found, claimed, strict=True):
        if bits is not None and not layer.quantizer:
            warnings.append(
                f"{layer.name}: its input is not quantized with a whole zero point; OpenVINO rounds a shift to one, "
                "and the result differs"
            )
        elif bits is not None and bits > 8:
            warnings.append(f"{layer.name}: OpenVINO drops the quantizer of {bits}-bit inputs, and the result differs")
        elif layer.quantizer and readers[layer.source] > 1:
            warnings.append(f"{layer.name}: reads the same tensor as another layer and may run in floats")
    wide = {layer.name: bits for layer in matched_operands(file) if (bits := layer.facts.get("input bits") or 0) > 8}
    return warnings + [
        f"{name}: OpenVINO drops the quantizer of {bits}-bit operands, and the result differs"
        for name, bits in wide.items()
    ]
