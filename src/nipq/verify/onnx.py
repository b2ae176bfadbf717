"""ONNX files, portable or QONNX, as candidates: numbers of the graph (E0), layer by layer (E1) and on the task (E2).

E0 compares every stored number with the trained one, and the bytes of weights and file with those promised.

E1 runs a teacher-forced graph in ONNX Runtime's faithful session: the same graph with every layer's input replaced by
the trained one. Each layer gets a copy of its quantizer that reads an input of its own; its sum reads the copy. The
quantizer that was there stays and reads what arrives from the layers before, which is how the cut includes the next
quantizer. QONNX's ``Quant`` is first written out in operators that ONNX Runtime knows, as its definition says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.errors import ConfigError, FileFormatError, require
from nipq.export.onnx_read import (
    QONNX_DOMAIN,
    MatchedLayer,
    OnnxFile,
    matched_layers,
    matched_operands,
    quant_range,
    read_onnx,
)
from nipq.export.onnx_write import FIXED_BATCH, onnx_bytes, producer, qonnx_bytes
from nipq.export.portable import PortableInput, PortableLayer, portable_layers, portable_products
from nipq.export.program import call_arguments
from nipq.export.runtimes import faithful_session
from nipq.nn.deployed import Deployed, deployed_layers
from nipq.nn.kinds import along_channels
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.layer_table import operand_point
from nipq.prepare.teacher_forcing import Calls
from nipq.verify.candidate import Candidate, differences
from nipq.verify.metrics import flips_in, layer_check
from nipq.verify.reference import ReferenceRun
from nipq.verify.result import Check

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from onnxruntime import InferenceSession

#: ONNX's numbers of the types that share bytes.
PACKED_TYPES = frozenset({21, 22, 25, 26})
#: Bits of a stored element, by ONNX's number of its type.
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 11: 64, 21: 4, 22: 4, 25: 2, 26: 2}
#: ONNX's numbers of float32 and int64.
_FLOAT, _INT64 = 1, 7

#: Any message of the format.
Message = TypeVar("Message", "ModelProto", "NodeProto")


class OnnxCandidate(Candidate):
    """An ONNX file that ``nipq.export`` wrote: E0, E1, E2.

    Args:
        path: the file.
        deployed: the trained model as ``nipq.convert`` deploys it, on the CPU.
        layers: quantization points, layers and products of the trained model.
        example: one batch.

    Raises:
        FileFormatError: if it cannot be read.
        MissingDependencyError: if a package that reads or runs it is not installed.
    """

    def __init__(self, path: Path, deployed: nn.Module, layers: Iterable[str], example: ExampleInputs) -> None:
        self.path, self.deployed, self.example = path, deployed, example
        self.failure: str | None = None
        self.file = read_onnx(path)
        try:
            self.matched, self.operands = matched_layers(self.file), matched_operands(self.file)
            whole = _runnable(self.file)
            model, self.probes = teacher_forced_graph(self.file, self.matched, self.operands)
        except FileFormatError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError, OverflowError, StopIteration) as error:
            # Nodes may lack anything that nodes have.
            raise FileFormatError(
                f"{path}: expected a sound graph, found: {error!r}. Export or copy the model again."
            ) from error
        super().__init__(path.name, OnnxModule(self._session(whole), path), layers, is_file=True)
        # Forced inputs have the sizes of the trained model's tensors, of which the graph's own sizes know nothing.
        self.forced = self._session(model, reuse_memory=False)
        for matched in (*self.matched, *self.operands):
            if (layer := self.layers.get(matched.name)) is not None:
                layer.levels = matched.facts.get("highest code", 0) - matched.facts.get("lowest code", 0)
                # QONNX adds the zero point before it rounds: a tie or a long sum may fall to the other side.
                layer.inexact = self.file.form == "qonnx" and matched.facts.get("zero point", 0) != 0

    def _session(self, model: ModelProto, *, reuse_memory: bool = True) -> InferenceSession:
        """A faithful session of the graph that was checked, not of the file as it is on the disk by now."""
        return faithful_session(model.SerializeToString(), name=str(self.path), reuse_memory=reuse_memory)

    def static_check(self) -> Check:
        """Level E0: integers, scales, zero points and limits of the graph itself, and bytes of the weights."""
        layers, numbers, form = deployed_layers(self.deployed), portable_layers(self.deployed), self.file.form
        facts = {name: _expected_facts(layer, numbers[name], form) for name, layer in layers.items()}
        products = portable_products(self.deployed)
        for name, product in products.items():
            facts |= {operand_point(name, part): _expected_input_facts(given, form) for part, given in product.items()}
        expected = {point: facts[point] for point in self.layers if point in facts}
        found = list(_differences([*self.matched, *self.operands], expected))
        promised, stored = _weight_bytes(self.file, numbers)
        if stored > promised:
            found.append(f"{stored:,} bytes of weights, promised {promised:,}")
        size = self.path.stat().st_size
        whole = None if found else _promised_bytes(self.file, self.deployed, self.example)
        if whole is not None and size > whole:
            found.append(f"{size:,} bytes on disk, promised {whole:,}")
        counted = {
            "layers": len({matched.name for matched in self.matched}),
            **({"products": len(products)} if products else {}),
            **({} if whole is None else {"bytes_promised": whole}),
            "bytes_found": size,
            "weight_bytes_promised": promised,
            "weight_bytes_found": stored,
            "differences": len(found),
        }
        claim = "integers, scales, zero points, limits of the graph"
        return Check("E0 static", claim, not found, counted, found[0] if found else None)

    def compare(self, reference: ReferenceRun) -> None:
        """Run the file on one piece of data and add the differences found, until it fails to run."""
        if self.failure is None:
            try:
                super().compare(reference)
            except FileFormatError as error:
                self.failure, self.module = str(error), None

    def logits(self, reference: ReferenceRun) -> Tensor:
        """Logits, with the layers compared for E1 on the way."""
        self._compare_layers(reference)
        return super().logits(reference)

    def _compare_layers(self, reference: ReferenceRun) -> None:
        done: dict[str, int] = defaultdict(int)
        feed = _feed(self.forced, *call_arguments(reference.inputs))
        for probe in self.probes:
            if probe.forced is None:
                continue
            calls = reference.calls.inputs.get(probe.name, [])
            if done[probe.name] >= len(calls):
                if probe.name in self.layers:
                    self.layers[probe.name].calls_differ = True
                return
            forced = calls[done[probe.name]].detach().cpu()  # of a table, numbers of rows
            feed[probe.forced] = (forced.float() if forced.is_floating_point() else forced.long()).numpy()
            done[probe.name] += 1
        unknown = {matched.name for matched in self.matched if not matched.source}
        for name, layer in self.layers.items():
            layer.calls_differ |= name not in unknown and done[name] != len(reference.calls.inputs[name])
        names = sorted({name for probe in self.probes for name in (probe.arrived, probe.codes, probe.output) if name})
        found = dict(zip(names, _run(self.forced, feed, self.path, names), strict=True))
        done.clear()
        for probe in self.probes:
            self._compare_call(probe, reference.calls, done[probe.name], found)
            done[probe.name] += 1

    def _compare_call(self, probe: Probe, calls: Calls, call: int, found: Mapping[str, NDArray[Any]]) -> None:
        layer = self.layers[probe.name]
        if probe.output is not None:
            output = torch.from_numpy(found[probe.output])
            expected = calls.outputs[probe.name][call].cpu().float()
            if output.shape != expected.shape:
                layer.calls_differ = True
                return
            layer.add_output(expected, output)
        codes = calls.codes.get(probe.name)
        if codes and probe.arrived is not None and probe.codes is not None:
            same, arrived = (_relative(found[name], probe.zero_point) for name in (probe.codes, probe.arrived))
            layer.add_codes(codes[call].cpu(), same, arrived)

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """E1 and E2: a file of float operators is not bit-equal to integer sums."""
        if self.failure is not None:
            return [Check("E1 layers", "the file runs on the data", False, {}, self.failure)]
        return [layer_check(self.layers), self.output.check(scores, flips_in(self.layers))]


def _relative(codes: NDArray[Any], zero_point: int) -> Tensor:
    """Stored codes counted from the value 0."""
    return torch.from_numpy(codes.astype(np.float32) - zero_point)


class OnnxModule(nn.Module):
    """An ONNX Runtime session that is called like the model it was exported from.

    Args:
        session: an ONNX Runtime session.
        path: its file, for messages.
    """

    def __init__(self, session: InferenceSession, path: Path) -> None:
        super().__init__()
        self.session, self.path = session, path

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:  # noqa: ANN401  (the model's own arguments)
        """All outputs; one that is alone as it is.

        Args:
            *args: the model's arguments; whatever is no tensor lies in the graph.
            **kwargs: the same by name.

        Raises:
            FileFormatError: if the runtime cannot run the file on them.
        """
        feed = _feed(self.session, args, kwargs)
        outputs = [torch.from_numpy(value) for value in _run(self.session, feed, self.path)]
        return outputs[0] if len(outputs) == 1 else outputs


def _feed(session: InferenceSession, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """A call's tensors by the names of a session's inputs; positional arguments in the order of the inputs."""
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (value for value in args if isinstance(value, Tensor)), strict=False))
    given |= {key: value for key, value in kwargs.items() if key in names}
    return {key: value.detach().cpu().numpy() for key, value in given.items()}


def _run(session: InferenceSession, feed: dict[str, NDArray[Any]], path: Path, outputs: Any = None) -> Any:  # noqa: ANN401
    """Run a session for the named outputs, or all; the runtime's errors name the file."""
    try:
        return session.run(outputs, feed)
    except Exception as error:  # the runtime's exceptions share no base class
        shapes = {name: value.shape for name, value in feed.items()}
        raise FileFormatError(
            f"{path}: expected a file that runs on inputs of shape {shapes}, found: {error}. Export the model again, "
            "with an example of at least two samples, or give batches of the example's size."
        ) from error


def _differences(matched: Sequence[MatchedLayer], expected: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Compare every number of the file's layers and operands with the trained one, bit for bit.

    Args:
        matched: layers of the file, and operands of products.
        expected: the facts that each of them must hold, in the order of execution.

    Yields:
        One sentence per difference, with the layer's full name.
    """
    by_name: dict[str, list[MatchedLayer]] = {}
    for layer in matched:
        by_name.setdefault(layer.name, []).append(layer)
    for name in [*expected, *(name for name in by_name if name not in expected)]:
        if name not in by_name or name not in expected:
            yield f"{name}: only the {'trained model' if name in expected else 'file'} quantizes it"
            continue
        for layer in by_name[name]:
            facts = _comparable(layer.facts, expected[name])
            yield from differences(name, expected[name], facts, "trained", "in the file")


def _expected_facts(layer: Deployed, numbers: PortableLayer, form: str) -> dict[str, Any]:
    """Facts of a layer that a file of the given form, ``"qcdq"`` or ``"qonnx"``, must hold."""
    facts: dict[str, Any] = {
        "weight bits": numbers.weight_bits,
        "weight codes": numbers.weight,
        "weight scale": numbers.weight_scale,
        "bias": numbers.bias,
    }
    if form == "qonnx":
        facts["weight scale"] = along_channels(numbers.weight_scale, layer.layer, numbers.weight)
        facts |= {"bits of the weight's Quant": float(numbers.code_bits), "weight on its levels": True}
    return facts if numbers.input is None else facts | _expected_input_facts(numbers.input, form)


def _expected_input_facts(given: PortableInput, form: str) -> dict[str, Any]:
    """Facts of a layer's input, or of an operand, that a file of the given form must hold."""
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


def _weight_bytes(file: OnnxFile, numbers: Mapping[str, PortableLayer]) -> tuple[int, int]:
    """Bytes of the weights: promised by their bit-widths, found in the file; each stored tensor once.

    Args:
        file: the file; QONNX promises floats, the portable form 8 or 16 bits.
        numbers: layers in the form that files hold.

    Returns:
        ``(promised, found)``; less is found in a packed file.
    """
    weights = [given.weight for given in numbers.values()]
    if file.form == "qonnx":  # levels of tied weights differ where their layers' scales were rounded
        promised = sum(4 * weight.numel() for weight in weights)
    else:
        promised = sum(weight.nbytes for weight in {weight.data_ptr(): weight for weight in weights}.values())
    stored = {
        node.input[0]
        for node in file.model.graph.node
        if node.op_type in ("DequantizeLinear", "Quant") and node.input[0] in file.initialisers
    }
    found = 0
    for name in stored:
        tensor = file.initialisers[name]
        found += -(-math.prod(tensor.dims) * ELEMENT_BITS.get(tensor.data_type, 64) // 8)
    return promised, found


def _promised_bytes(file: OnnxFile, deployed: nn.Module, example: ExampleInputs) -> int | None:
    """Bytes that the whole file should have: those that an export of the trained model has here and now.

    None if they cannot be known: other versions of the exporter wrote the file, or its batch is fixed.
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


def _comparable(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a file, one number for all channels spread over them, zeros that are not promised left out."""
    facts = {key: value for key, value in found.items() if key in expected or value not in (0, None)}
    for key, value in facts.items():
        wanted = expected.get(key)
        if isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.numel() == 1 != wanted.numel():
            facts[key] = value.reshape(-1).expand(wanted.shape)
        elif isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.numel() == wanted.numel() == 1:
            facts[key] = value.reshape(wanted.shape)
    return facts


@dataclass(frozen=True)
class Probe:
    """Tensors of the teacher-forced graph that show one call of a layer, of a product or of one of its operands.

    Attributes:
        name: full name of the layer or product, or the operand's quantization point.
        forced: input of the graph that stands for the layer's; None of a product, whose operands have one each.
        arrived: whole codes of the tensor that came from the layers before; None when the input stays float.
        codes: whole codes of the forced input; None when it stays float.
        output: the output of the layer or product; None of an operand.
        zero_point: stored code of the value 0.
    """

    name: str
    forced: str | None = None
    arrived: str | None = None
    codes: str | None = None
    output: str | None = None
    zero_point: int = 0


def _runnable(file: OnnxFile) -> ModelProto:
    """A copy of the file's graph in operators of ONNX alone."""
    model = _copy(file.model)
    _write_out(file, model, list(model.graph.node))
    return model


def teacher_forced_graph(
    file: OnnxFile, layers: Sequence[MatchedLayer], operands: Sequence[MatchedLayer]
) -> tuple[ModelProto, list[Probe]]:
    """The graph for level E1, every layer's input replaced by an input of the graph.

    Args:
        file: a file that was read.
        layers: its layers.
        operands: operands of its products.

    Returns:
        The graph, and a probe for each layer, operand and product.
    """
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    model = _copy(file.model)
    nodes, probes = list(model.graph.node), []
    for number, layer in enumerate([*layers, *operands]):
        if not layer.source:
            continue  # a forward of its own may do anything with its float input
        given, kind = f"nipq_forced_{number}", _INT64 if layer.total.op_type == "Gather" else _FLOAT
        model.graph.input.append(helper.make_tensor_value_info(given, kind, None))
        renamed = {layer.source: given}
        at = len(nodes)
        if layer.quantizer:
            last = layer.quantizer[-1].output[0]
            copies = [_renamed(node, renamed, f"nipq_{number}_") for node in layer.quantizer]
            at = next(i for i, node in enumerate(nodes) if last in node.output) + 1
            nodes[at:at] = copies
            at, renamed = at + len(copies), {last: copies[-1].output[0]}
        else:
            at = next((i for i, node in enumerate(nodes) if layer.source in node.output), -1) + 1
        own = _before(nodes[at:], layer.output)
        for node in nodes[at:]:
            if layer.quantizer or node.output[0] in own:
                _rename_inputs(node, renamed)
        arrived = _codes_of(layer)
        copied = None if arrived is None else f"nipq_{number}_{arrived}"
        output, zero_point = layer.output if number < len(layers) else None, int(layer.facts.get("zero point", 0))
        probes.append(Probe(layer.name, given, arrived, copied, output, zero_point))
    probes += [Probe(record.name, output=record.output) for record in file.products]
    _write_out(file, model, nodes)
    _watch(file, model, probes)
    return model, probes


def _codes_of(layer: MatchedLayer) -> str | None:
    """The tensor of whole codes; a ``Quant`` is given one when it is written out."""
    if not layer.quantizer:
        return None
    return layer.codes or _codes_name(layer.quantizer[-1].output[0])


def _codes_name(quantized: str) -> str:
    return f"{quantized}_codes"


def _before(nodes: list[NodeProto], output: str) -> set[str]:
    """Names made on the way back from a layer's output to its sum, the sum's own among them."""
    producers = {name: node for node in nodes for name in node.output}
    waiting, found = [output], set()
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is None or name in found:
            continue
        found.add(name)
        waiting += node.input
    return found


def _renamed(node: NodeProto, renamed: dict[str, str], prefix: str) -> NodeProto:
    """A copy whose outputs have names of their own, and whose inputs are the copies before it."""
    copy = _copy(node)
    _rename_inputs(copy, renamed)
    for index, name in enumerate(node.output):
        renamed[name] = copy.output[index] = prefix + name
    copy.name = prefix + node.name
    return copy


def _rename_inputs(node: NodeProto, renamed: dict[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = renamed.get(name, name)


def _write_out(file: OnnxFile, model: ModelProto, nodes: list[NodeProto]) -> None:
    """Give a graph these nodes, QONNX's written out in operators of ONNX, and take QONNX's domain from the model."""
    kept = [_copy(written) for node in nodes for written in _written_out(file, node)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for index, entry in enumerate(model.opset_import):
        if entry.domain == QONNX_DOMAIN:
            del model.opset_import[index]
            break


def _written_out(file: OnnxFile, node: NodeProto) -> list[NodeProto]:
    """A ``Quant`` as ``(clip(round(x / scale + zero point)) - zero point) * scale``; any other node as it is."""
    if node.domain != QONNX_DOMAIN:
        return [node]
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    x, scale, zero_point, bits = node.input
    y = node.output[0]
    low, high = quant_range(node, int(file.values(bits, y)))
    bounds = [
        helper.make_node("Constant", [], [f"{y}_{name}"], value_float=float(value))
        for name, value in (("low", low), ("high", high))
    ]
    steps: list[tuple[str, list[str], str]] = [
        ("Div", [x, scale], f"{y}_divided"),
        ("Add", [f"{y}_divided", zero_point], f"{y}_shifted"),
        ("Round", [f"{y}_shifted"], f"{y}_rounded"),
        ("Clip", [f"{y}_rounded", f"{y}_low", f"{y}_high"], _codes_name(y)),
        ("Sub", [_codes_name(y), zero_point], f"{y}_whole"),
        ("Mul", [f"{y}_whole", scale], y),
    ]
    return [*bounds, *(helper.make_node(kind, inputs, [output]) for kind, inputs, output in steps)]


def _watch(file: OnnxFile, model: ModelProto, probes: list[Probe]) -> None:
    """Make the probes' tensors outputs of the graph."""
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    known = {value.name for value in model.graph.output}
    for probe in probes:
        for name, original in ((probe.arrived, probe.arrived), (probe.codes, probe.arrived), (probe.output, None)):
            if name is None or name in known:
                continue
            known.add(name)
            kind = _FLOAT if original is None else _type_of(file, original)
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))


def _type_of(file: OnnxFile, codes: str) -> int:
    """ONNX's number of the type of codes: that of the zero point they are read with, or float in QONNX."""
    reader = next((node for node in file.consumers.get(codes, ()) if node.op_type == "DequantizeLinear"), None)
    return _FLOAT if reader is None else file.initialisers[reader.input[2]].data_type


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
