"""Rung E0 of an ONNX file: every stored number against the trained one, and how many bytes the weights take.

The same ONNX graph with every layer's input replaced by the trained one, so that a layer answers for itself only.

Each layer gets a copy of its quantizer that reads an input of its own; its sum reads the copy. The quantizer that was
there stays and reads what arrives from the layers before, which is how the cut includes the next quantizer. QONNX's
``Quant`` is first written out in operators that ONNX Runtime knows, as its definition says.

An ONNX file, portable or QONNX: static, layer by layer and on the task, in ONNX Runtime's faithful mode.
"""

from __future__ import annotations

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
from nipq.export.modules import Deployed, deployed_layers
from nipq.export.onnx_read import QONNX_DOMAIN, Cell, OnnxFile, cells, operands, read_onnx
from nipq.export.onnx_write import FIXED_BATCH, onnx_bytes, producer, qonnx_bytes
from nipq.export.portable import PortableInput, PortableLayer, portable_layers, portable_products
from nipq.export.runtimes import faithful_session
from nipq.nn.kinds import along_channels
from nipq.prepare.layer_table import place_of
from nipq.prepare.trace import ExampleInputs
from nipq.verify.candidate import Subject
from nipq.verify.metrics import flips_in, layer_rung
from nipq.verify.reference import Observation
from nipq.verify.result import Rung
from nipq.verify.static import differences

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from onnxruntime import InferenceSession

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


_FLOAT, _INT64 = 1, 7

#: Any message of the format.
Message = TypeVar("Message", "ModelProto", "NodeProto")


@dataclass(frozen=True)
class Probe:
    """Where one call of a layer, of a product or of one of its operands can be watched in the forced graph.

    Attributes:
        name: full name of the layer or product, or the operand's place.
        forced: input of the graph that takes the place of the layer's; None of a product, whose operands have one each.
        arrived: whole codes of what came from the layers before; None when the input stays float.
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


def runnable(file: OnnxFile) -> ModelProto:
    """The file's graph in operators of ONNX alone.

    Args:
        file: a file that was read.

    Returns:
        A copy.
    """
    model = _copy(file.model)
    nodes = [node for given in model.graph.node for node in _written_out(file, given)]
    _replace(model.graph, nodes)
    for place, entry in enumerate(model.opset_import):
        if entry.domain == QONNX_DOMAIN:
            del model.opset_import[place]
            break
    return model


def forced(file: OnnxFile, layers: Sequence[Cell], operands: Sequence[Cell]) -> tuple[ModelProto, list[Probe]]:
    """The graph for rung E1.

    Args:
        file: a file that was read.
        layers: its layers.
        operands: operands of its products.

    Returns:
        The graph, and a probe for each cell and each product.
    """
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    model = _copy(file.model)
    nodes, probes = list(model.graph.node), []
    for number, cell in enumerate([*layers, *operands]):
        given, kind = f"nipq_forced_{number}", _INT64 if cell.total.op_type == "Gather" else _FLOAT
        model.graph.input.append(helper.make_tensor_value_info(given, kind, None))
        renamed = {cell.source: given}
        at = len(nodes)
        if cell.quantizer:
            last = cell.quantizer[-1].output[0]
            copies = [_renamed(node, renamed, f"nipq_{number}_") for node in cell.quantizer]
            at = next(i for i, node in enumerate(nodes) if last in node.output) + 1
            nodes[at:at] = copies
            at, renamed = at + len(copies), {last: copies[-1].output[0]}
        else:
            at = next((i for i, node in enumerate(nodes) if cell.source in node.output), -1) + 1
        own = _before(nodes[at:], cell.output)
        for node in nodes[at:]:
            if cell.quantizer or node.output[0] in own:
                _rename_inputs(node, renamed)
        arrived = _codes_of(cell)
        copied = None if arrived is None else f"nipq_{number}_{arrived}"
        output, zero_point = cell.output if number < len(layers) else None, int(cell.facts.get("zero point", 0))
        probes.append(Probe(cell.name, given, arrived, copied, output, zero_point))
    probes += [Probe(record.name, output=record.output) for record in file.products]
    _replace(model.graph, [written for node in nodes for written in _written_out(file, node)])
    _watch(file, model, probes)
    for place, entry in enumerate(model.opset_import):
        if entry.domain == QONNX_DOMAIN:
            del model.opset_import[place]
            break
    return model, probes


def _codes_of(cell: Cell) -> str | None:
    """The tensor of whole codes; a ``Quant`` is given one when it is written out."""
    if not cell.quantizer:
        return None
    return cell.codes or _codes_name(cell.quantizer[-1].output[0])


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
    twin = _copy(node)
    _rename_inputs(twin, renamed)
    for place, name in enumerate(node.output):
        renamed[name] = twin.output[place] = prefix + name
    twin.name = prefix + node.name
    return twin


def _rename_inputs(node: NodeProto, renamed: dict[str, str]) -> None:
    for place, name in enumerate(node.input):
        node.input[place] = renamed.get(name, name)


def _written_out(file: OnnxFile, node: NodeProto) -> list[NodeProto]:
    """A ``Quant`` as ``(clip(round(x / scale + zero point)) - zero point) * scale``; any other node as it is."""
    if node.domain != QONNX_DOMAIN:
        return [node]
    helper = require("onnx.helper", extra="onnx", purpose="checking ONNX files")
    x, scale, zero_point, bits = node.input
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    width = int(file.values(bits, node.output[0]))
    signed, narrow = bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0))
    low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0, 2**width - 1 - narrow)
    y = node.output[0]
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
    """Make what the probes look at outputs of the graph."""
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


def _replace(graph: GraphProto, nodes: list[NodeProto]) -> None:
    kept = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _copy(message: Message) -> Message:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


class OnnxModule(nn.Module):
    """A session that is called like the model it was exported from.

    Args:
        session: an ONNX Runtime session.
        path: of its file, for messages.
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
        outputs = [
            torch.from_numpy(value) for value in run(self.session, arrays(self.session, args, kwargs), self.path)
        ]
        return outputs[0] if len(outputs) == 1 else outputs


def arrays(session: InferenceSession, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """A call's tensors by the names of a session's inputs.

    Args:
        session: an ONNX Runtime session.
        args: the model's arguments, in the order of the inputs.
        kwargs: the same by name.
    """
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (value for value in args if isinstance(value, Tensor)), strict=False))
    given |= {key: value for key, value in kwargs.items() if key in names}
    return {key: value.detach().cpu().numpy() for key, value in given.items()}


def run(session: InferenceSession, feed: dict[str, NDArray[Any]], path: Path, outputs: Any = None) -> Any:  # noqa: ANN401
    """Run a session.

    Args:
        session: an ONNX Runtime session.
        feed: inputs by name.
        path: of the file, for messages.
        outputs: names of what is wanted; everything if None.

    Raises:
        FileFormatError: if the runtime fails.
    """
    try:
        return session.run(outputs, feed)
    except Exception as error:  # the runtime's exceptions share no base class
        shapes = {name: value.shape for name, value in feed.items()}
        raise FileFormatError(
            f"{path}: expected a file that runs on inputs of shape {shapes}, found: {error}. Export the model again, "
            "with an example of at least two samples, or give batches of the example's size."
        ) from error


class OnnxSubject(Subject):
    """A file that ``nipq.export`` wrote.

    Args:
        path: the file.
        deployed: what ``nipq.convert`` makes of the trained model, on the CPU.
        layers: full names of the trained layers.
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
            self.cells, self.operands = cells(self.file), operands(self.file)
            whole = runnable(self.file)
            model, self.probes = forced(self.file, self.cells, self.operands)
        except FileFormatError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError, OverflowError, StopIteration) as error:
            # Nodes may lack anything that nodes have.
            raise FileFormatError(
                f"{path}: expected a sound graph, found: {error!r}. Export or copy the model again."
            ) from error
        super().__init__(path.name, OnnxModule(self._session(whole), path), layers, is_file=True)
        # What is forced has the sizes of the trained model's tensors, of which the graph's own sizes know nothing.
        self.forced = self._session(model, reuse_memory=False)
        for cell in (*self.cells, *self.operands):
            if cell.name in self.evidence:
                evidence = self.evidence[cell.name]
                evidence.levels = cell.facts.get("highest code", 0) - cell.facts.get("lowest code", 0)
                # QONNX adds the zero point before it rounds: a tie or a long sum may fall to the other side.
                evidence.inexact = self.file.form == "qonnx" and cell.facts.get("zero point", 0) != 0

    def _session(self, model: ModelProto, *, reuse_memory: bool = True) -> InferenceSession:
        """A faithful session of what was checked, not of what lies on the disk by now."""
        return faithful_session(model.SerializeToString(), name=str(self.path), reuse_memory=reuse_memory)

    def static(self) -> Rung:
        """Rung E0: integers, scales, zero points and limits of the graph itself, and bytes of the weights."""
        layers, numbers, form = deployed_layers(self.deployed), portable_layers(self.deployed), self.file.form
        facts = {name: expected_facts(layer, numbers[name], form) for name, layer in layers.items()}
        products = portable_products(self.deployed)
        for name, product in products.items():
            facts |= {place_of(name, part): input_facts(given, form) for part, given in product.items()}
        expected = {place: facts[place] for place in self.evidence if place in facts}
        found = list(onnx_differences([*self.cells, *self.operands], expected))
        promised, stored = weight_bytes(self.file, numbers, self.file.form)
        if stored > promised:
            found.append(f"{stored:,} bytes of weights, promised {promised:,}")
        size, whole = self.path.stat().st_size, None if found else promised_file(self.file, self.deployed, self.example)
        if whole is not None and size > whole:
            found.append(f"{size:,} bytes on disk, promised {whole:,}")
        counted = {
            "layers": len({cell.name for cell in self.cells}),
            **({"products": len(products)} if products else {}),
            **({} if whole is None else {"bytes_promised": whole}),
            "bytes_found": size,
            "weight_bytes_promised": promised,
            "weight_bytes_found": stored,
            "differences": len(found),
        }
        claim = "integers, scales, zero points, limits of the graph"
        return Rung("E0 static", claim, not found, counted, found[0] if found else None)

    def observe(self, seen: Observation) -> None:
        """Add one piece of data to the evidence, until the file fails to run.

        Args:
            seen: the trained model on it.
        """
        if self.failure is None:
            try:
                super().observe(seen)
            except FileFormatError as error:
                self.failure, self.module = str(error), None

    def run(self, seen: Observation) -> Tensor:
        """Logits, with the evidence for E1 on the way.

        Args:
            seen: the trained model on the same data.
        """
        self._force(seen)
        return super().run(seen)

    def _force(self, seen: Observation) -> None:
        inputs, done = seen.inputs, defaultdict[str, int](int)
        args, kwargs = (
            ((), inputs) if isinstance(inputs, Mapping) else ([inputs] if isinstance(inputs, Tensor) else inputs, {})
        )
        feed = arrays(self.forced, args, kwargs)
        for probe in self.probes:
            if probe.forced is None:
                continue
            calls = seen.calls.inputs.get(probe.name, [])
            if done[probe.name] >= len(calls):
                self._differently(probe.name)
                return
            forced = calls[done[probe.name]].detach().cpu()  # of a table, numbers of rows
            feed[probe.forced] = (forced.float() if forced.is_floating_point() else forced.long()).numpy()
            done[probe.name] += 1
        for name, evidence in self.evidence.items():
            evidence.calls_differ |= done[name] != len(seen.calls.inputs[name])
        names = sorted({name for probe in self.probes for name in (probe.arrived, probe.codes, probe.output) if name})
        found = dict(zip(names, run(self.forced, feed, self.path, names), strict=True))
        done.clear()
        for probe in self.probes:
            self._compare(probe, seen, done[probe.name], found)
            done[probe.name] += 1

    def _compare(self, probe: Probe, seen: Observation, call: int, found: Mapping[str, NDArray[Any]]) -> None:
        evidence = self.evidence[probe.name]
        if probe.output is not None:
            output = torch.from_numpy(found[probe.output])
            expected = seen.calls.outputs[probe.name][call].cpu().float()
            if output.shape != expected.shape:
                evidence.calls_differ = True
                return
            evidence.add_output(expected, output)
        codes = seen.calls.codes.get(probe.name)
        if codes and probe.arrived is not None and probe.codes is not None:
            same, arrived = (_relative(found[name], probe.zero_point) for name in (probe.codes, probe.arrived))
            evidence.add_codes(codes[call].cpu(), same, arrived)

    def _differently(self, name: str) -> None:
        if name in self.evidence:
            self.evidence[name].calls_differ = True

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E1 and E2: a file of float operators is not bit-equal to integer sums.

        Args:
            scores: the task's score of both.
        """
        if self.failure is not None:
            return [Rung("E1 layers", "the file runs on the data", False, {}, self.failure)]
        return [layer_rung(self.evidence), self.distance.rung(scores, flips_in(self.evidence))]


def _relative(codes: NDArray[Any], zero_point: int) -> Tensor:
    """Stored codes counted from the value 0."""
    return torch.from_numpy(codes.astype(np.float32) - zero_point)
