"""Candidates that are ZIP archives: plain arrays (NPZ) and ``torch.export`` programs (PT2), compared as data.

Archives are read in memory, never unpacked on the disk, and never longer than the file itself.

An NPZ file holds no wiring, so there is no network to run: every array and fact is compared (E0), then each layer and
product is computed in NumPy's whole numbers (E1, E3); E2 does not exist.

A PT2 file is code, and torch's own loader runs pickles: a file that differs is never loaded. It is compared, number by
number and node by node, with the program that the trained model gives here and now. Only if nothing differs there is
something to run: that very program.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export import arrays_reference as numpy_reference
from nipq.export.arrays import FACTS, PRODUCT, arrays_bytes
from nipq.export.program import program_bytes
from nipq.nn.deployed import DeployedLayer, deployed_layers, deployed_products
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.layer_table import OPERANDS, operand_point
from nipq.prepare.teacher_forcing import run_teacher_forced
from nipq.verify.candidate import Candidate, differences
from nipq.verify.metrics import exact_check, layer_check
from nipq.verify.reference import ReferenceRun, run_model
from nipq.verify.result import Check

#: Times the promised size that a file may have before it is refused unread.
TIMES_PROMISED = 4
#: Bytes that a file may have beyond that, so that small ones are not refused.
BYTES_BESIDES = 2**20
#: Samples that are computed in NumPy: whole numbers are slow there.
SAMPLES = 2
#: Members of a program's archive: its graph, its tensors, and the list of those.
GRAPH = "models/model.json"
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"
#: Entries of the graph that differ from one export to the next and do not matter: sizes of the example, class names.
MEANINGLESS = frozenset({"hint", "metadata"})
#: Members that only number the file.
NUMBERS = frozenset({".data/serialization_id"})


def members(data: bytes, path: Path) -> dict[str, bytes]:
    """Contents of an archive by name; the path is for messages.

    Raises:
        FileFormatError: if it is damaged, compressed, or claims to hold more than it is long.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            plain = all(
                (entry.compress_type, entry.compress_size, entry.volume) == (zipfile.ZIP_STORED, entry.file_size, 0)
                for entry in entries
            )
            if not plain or sum(entry.file_size for entry in entries) > len(data):
                raise FileFormatError(
                    f"{path}: expected an archive that is stored as it is, found a compressed or overlapping one. "
                    "Export the model again."
                )
            found = {entry.filename: archive.read(entry) for entry in entries}
        if not _one_end(data):
            raise ValueError("its two ends are not those of one archive")
    except FileFormatError:
        raise
    except Exception as error:  # the module answers damage with many kinds of error
        raise FileFormatError(
            f"{path}: expected a whole archive, found: {error}. Export or copy the model again."
        ) from error
    if len(found) < len(entries):
        raise FileFormatError(f"{path}: expected every name once, found some twice. Export the model again.")
    return found


def _one_end(data: bytes) -> bool:
    """Return whether the ends of an archive, the plain one and that of ZIP64, name one directory.

    Python reads the one and torch the other, so a file might be two archives.
    """
    signature, disk, start, *plain, comment = struct.unpack("<4s4H2IH", data[-22:])
    if signature != b"PK\x05\x06" or disk or start or comment:
        return False
    if data[-42:-38] != b"PK\x06\x07":
        return True
    here, _, _, _, *record = struct.unpack("<4sQ2H2I4Q", data[-98:-42])
    locator = struct.unpack("<IQI", data[-38:-22])
    full = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    same = all(a in (b, most) for a, b, most in zip(plain, record[2:], full, strict=True))
    return same and here == b"PK\x06\x06" and record[:2] == [0, 0] and locator == (0, len(data) - 98, 1)


def read(path: Path, promised: int) -> bytes:
    """Read a file that is not far longer than the bytes promised.

    Raises:
        FileFormatError: if it is missing or too long.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a file, found none. Check the path.")
    longest = TIMES_PROMISED * promised + BYTES_BESIDES
    if path.stat().st_size > longest:
        raise FileFormatError(f"{path}: expected about {promised:,} bytes, found {path.stat().st_size:,}.")
    return path.read_bytes()


class ArraysCandidate(Candidate):
    """An NPZ file that ``nipq.export`` wrote: E0, E1, E3.

    Args:
        path: the file.
        deployed: the trained model as ``nipq.convert`` deploys it, on the CPU.
        layers: quantization points, layers and products of the trained model.
        example: one batch.

    Raises:
        FileFormatError: if it cannot be read.
    """

    def __init__(self, path: Path, deployed: nn.Module, layers: Iterable[str], example: ExampleInputs) -> None:
        super().__init__(path.name, None, layers, is_file=True)
        self.deployed = deployed
        promised, _ = arrays_bytes(deployed, example)
        data = read(path, len(promised))
        self.promised, self.bytes = members(promised, path), (len(promised), len(data))
        self.found = members(data, path)
        self.facts = _facts(self.promised, path), _facts(self.found, path)
        self.wrong = dict(self._differences())
        self.computed: dict[str, float] = {}

    def static_check(self) -> Check:
        """Level E0: every array, bit for bit, and every fact."""
        first = next(iter(self.wrong.values()), None)
        if first is None and self.bytes[0] != self.bytes[1]:
            first = f"{self.bytes[1]:,} bytes, promised {self.bytes[0]:,}"
        numbers = {
            "arrays": len(self.found) - 1,
            "bytes_promised": self.bytes[0],
            "bytes_found": self.bytes[1],
            "differences": len(self.wrong),
        }
        return Check("E0 static", "every array and fact", first is None, numbers, first)

    def _differences(self) -> Iterator[tuple[str, str]]:
        """One sentence for each layer or array that differs, by its name."""
        ours, theirs = self.facts
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            where = name or "the model"
            if name not in ours or name not in theirs:
                yield name, f"{where}: only the {'trained model' if name in ours else 'file'} quantizes it"
                continue
            sides = (_flat(ours[name]), _flat(theirs[name]))
            fault = next(differences(where, *sides, "trained", "in the file"), None)
            keys = ours[name]["arrays"].values()
            fault = fault or next((text for key in keys if (text := self._array_difference(key))), None)
            if fault is not None:
                yield name, fault
        known = {key for facts in ours.values() for key in facts["arrays"].values()}
        others = {key.removesuffix(".npy") for key in (*self.promised, *self.found)} - known - {FACTS}
        for key in sorted(others):
            if text := self._array_difference(key):
                yield key, text

    def _array_difference(self, key: str) -> str | None:
        ours, theirs = self.promised.get(f"{key}.npy"), self.found.get(f"{key}.npy")
        if ours == theirs:
            return None
        if ours is None or theirs is None:
            return f"{key}: only {'trained' if theirs is None else 'in the file'}"
        if _header(ours) != _header(theirs) or len(ours) != len(theirs):
            return f"{key}: another type or shape in the file"
        a, b = _array(ours), _array(theirs)
        return f"{key}: {int((a != b).sum()):,} of {a.size:,} differ (trained against in the file)"

    def compare(self, reference: ReferenceRun) -> None:
        """Compute each layer and product on a few trained inputs, once."""
        if self.computed:
            return
        exact = self._exact_outputs(reference)
        for name, facts in self.facts[0].items():
            # Facts that differ may be made to hang: unsound layers are not run.
            same = name in self.facts[1] and facts == self.facts[1][name]
            parts = {part: self.found.get(f"{key}.npy", b"") for part, key in facts["arrays"].items()}
            ours = {part: self.promised[f"{key}.npy"] for part, key in facts["arrays"].items()}
            for part, whole in ours.items():  # an array that is cut short cannot be read
                same = same and _header(parts[part]) == _header(whole) and len(parts[part]) == len(whole)
            if not same:
                self.layers[name].calls_differ = True
            elif facts["kind"] == PRODUCT or (facts["input_bits"] is not None and not facts["custom"]):
                layer = facts | {part: _array(data) for part, data in parts.items()}
                self.computed[name] = max(
                    (self._compute(name, layer, reference, call, y) for call, y in enumerate(exact[name])), default=0.0
                )

    def _compute(self, name: str, layer: dict[str, Any], reference: ReferenceRun, call: int, exact: Tensor) -> float:
        """Compare one call; returns the largest difference from the deployed layer's output."""
        inputs, few = {name: layer}, slice(SAMPLES)
        if layer["kind"] == PRODUCT:
            inputs = {operand_point(name, part): numpy_reference.operand(layer, part) for part in OPERANDS}
            few = _samples(exact, *(reference.calls.inputs[point][call] for point in inputs))
        given = [reference.calls.inputs[point][call][few].cpu().float().numpy() for point in inputs]
        with np.errstate(all="ignore"):  # numbers that differ may be anything
            for (point, facts), x in zip(inputs.items(), given, strict=True):
                codes = torch.from_numpy(numpy_reference.codes(facts, x).astype(np.float32))
                self.layers[point].add_codes(reference.calls.codes[point][call][few].cpu(), codes, codes)
            output = torch.from_numpy(numpy_reference.run(layer, *given))
        self.layers[name].add_output(reference.calls.outputs[name][call][few].cpu(), output)
        return float((output - exact[few]).abs().max()) if output.numel() else 0.0

    def _exact_outputs(self, reference: ReferenceRun) -> dict[str, list[Tensor]]:
        """Outputs of the deployed layers and products on the trained inputs."""
        kept: dict[str, list[Tensor]] = defaultdict(list)
        layers = {name: x for name, x in deployed_layers(self.deployed).items() if isinstance(x, DeployedLayer)}
        handles = [
            module.register_forward_hook(
                lambda _module, _args, y, name=name: kept[name].append(y.clone()), prepend=True
            )
            for name, module in (layers | deployed_products(self.deployed)).items()
        ]
        try:
            run_teacher_forced(self.deployed, reference.calls, {}, partial(run_model, inputs=reference.inputs))
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """E1 and E3; there are no scores without a network."""
        del scores
        first = next((f"{name}: the output differs by {far:.3g}" for name, far in self.computed.items() if far), None)
        worst = max(self.computed.values(), default=0.0)
        numbers = {"layers_computed": len(self.computed), "layers": len(self.facts[0]), "output_difference": worst}
        exact = Check("E3 exact", "each layer in NumPy, bit for bit", first is None, numbers, first)
        return [layer_check(self.layers), exact]


def _facts(found: Mapping[str, bytes], path: Path) -> dict[str, dict[str, Any]]:
    """Facts by layer."""
    try:
        layers = json.loads(found.get(FACTS, b"null"))["layers"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected {FACTS} with layers, found: {error}. Export the model again."
        ) from error
    if not isinstance(layers, dict) or not all(isinstance(facts, dict) for facts in layers.values()):
        raise FileFormatError(f"{path}: expected {FACTS} with layers by name, found others. Export the model again.")
    return layers


def _samples(*tensors: Tensor) -> slice:
    """A few samples of a product's tensors, if they have them along one first axis; otherwise all."""
    alike = tensors[0].ndim > 2 and len({(x.ndim, len(x)) for x in tensors}) == 1
    return slice(SAMPLES if alike else None)


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with those of operands among them, so that a difference is said of the one that differs."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        is_operand = key in OPERANDS and isinstance(value, dict)
        found |= {f"{key}: {inner}": fact for inner, fact in value.items()} if is_operand else {key: value}
    return found


def _header(data: bytes) -> bytes:
    """The part of an ``.npy`` file before its numbers."""
    return data[: 10 + int.from_bytes(data[8:10], "little")]


def _array(data: bytes) -> NDArray[Any]:
    """An array whose header was checked."""
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


class ProgramCandidate(Candidate):
    """A ``.pt2`` file that ``nipq.export`` wrote: E0, and if nothing differs E2, E3.

    Args:
        path: the file.
        deployed: the trained model as ``nipq.convert`` deploys it, on the CPU.
        layers: quantization points, layers and products of the trained model.
        example: one batch.

    Raises:
        FileFormatError: if it cannot be read.
    """

    def __init__(self, path: Path, deployed: nn.Module, layers: Iterable[str], example: ExampleInputs) -> None:
        promised, _ = program_bytes(deployed, example)
        data = read(path, len(promised))
        ours, theirs = (_by_name(members(given, path)) for given in (promised, data))
        self.differences = list(_program_differences(ours, theirs, path))
        module = ProgramModule(torch.export.load(io.BytesIO(promised)))
        super().__init__(path.name, module, layers, is_file=True)
        self.size = len(data)

    def static_check(self) -> Check:
        """Level E0: every number and every node."""
        numbers = {"bytes_found": self.size, "differences": len(self.differences)}
        first = self.differences[0] if self.differences else None
        return Check("E0 static", "every number and every node of the program", first is None, numbers, first)

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """E2 and E3, if the program is the one that was run."""
        if self.differences:
            return []
        return [self.output.check(scores), exact_check({}, self.output.exact)]


def _by_name(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members without the name of the archive before theirs."""
    return {name.partition("/")[2]: data for name, data in found.items()}


def _program_differences(ours: Mapping[str, bytes], theirs: Mapping[str, bytes], path: Path) -> Iterator[str]:
    """One sentence for every difference of two programs."""
    graphs = [_json(side, GRAPH, path) for side in (ours, theirs)]
    configs = [_json(side, WEIGHTS_CONFIG, path).get("config", {}) for side in (ours, theirs)]
    yield from _tensor_differences(ours, theirs, configs)
    made, found = (graph.get("torch_version") for graph in graphs)
    if made != found:
        yield f"written by torch {found}, compared with a program of torch {made}: export it again with this one"
    mine, other = map(_inputs, graphs)
    if mine != other:
        yield (
            f"exported with the inputs {', '.join(other)}, verified with {', '.join(mine)}: export it with the inputs "
            "that the model was prepared with, without labels that it does not need"
        )
    nodes = [_nodes(graph) for graph in graphs]
    for a, b in zip(*nodes, strict=False):
        if _meaning(a) != _meaning(b):
            yield f"{_layer_of(a)}: node {a.get('name')!r} ({a.get('target')}) is another one in the file"
    if len(nodes[0]) != len(nodes[1]):
        yield f"{len(nodes[1])} nodes in the file, {len(nodes[0])} in the trained model"
    compared = {WEIGHTS_CONFIG, *NUMBERS, *(WEIGHTS + str(entry.get("path_name")) for entry in configs[0].values())}
    for name in sorted((ours.keys() | theirs.keys()) - compared):
        if name == GRAPH or name.endswith(".json"):
            same = (
                name in ours
                and name in theirs
                and _meaning(_json(ours, name, path)) == _meaning(_json(theirs, name, path))
            )
        else:
            same = ours.get(name) == theirs.get(name)
        if not same:
            yield f"{name}: another one in the file"


def _tensor_differences(
    ours: Mapping[str, bytes], theirs: Mapping[str, bytes], configs: list[dict[str, Any]]
) -> Iterator[str]:
    mine, other = configs
    for name in [*mine, *(name for name in other if name not in mine)]:
        if name not in mine or name not in other:
            yield f"{name}: only {'trained' if name in mine else 'in the file'}"
        elif mine[name] != other[name]:
            yield f"{name}: another type, shape or place in the file"
        else:
            a, b = (side.get(WEIGHTS + mine[name]["path_name"], b"") for side in (ours, theirs))
            if a != b:
                count = int((np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).sum()) if len(a) == len(b) else 0
                yield f"{name}: {f'{count:,} of {len(a):,} bytes differ' if count else 'another length'}"


def _json(side: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(side[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: expected {name}, found: {error!r}. Export the model again.") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected {name} with entries, found none. Export the model again.")
    return value


def _nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        nodes = graph["graph_module"]["graph"]["nodes"]
        return [node for node in nodes if isinstance(node, dict)]
    except (KeyError, TypeError):
        return []


def _inputs(graph: dict[str, Any]) -> list[str]:
    """Names of the tensors that the program is called with."""
    try:
        specs = graph["graph_module"]["signature"]["input_specs"]
        users = [spec["user_input"]["arg"] for spec in specs if "user_input" in spec]
        return [str(arg["as_tensor"]["name"]) for arg in users if "as_tensor" in arg]
    except (KeyError, TypeError):
        return []


def _meaning(value: Any) -> Any:  # noqa: ANN401  (any JSON)
    """A value without its entries that do not matter."""
    if isinstance(value, dict):
        return {key: _meaning(inner) for key, inner in value.items() if key not in MEANINGLESS}
    return [_meaning(inner) for inner in value] if isinstance(value, list) else value


def _layer_of(node: dict[str, Any]) -> str:
    """Full name of the module that a node came from."""
    stack = str(node.get("metadata", {}).get("nn_module_stack", "")).split(";")
    return next((part.split(",")[1] for part in reversed(stack) if part.count(",") > 1), "") or "the model"


class ProgramModule(nn.Module):
    """A program that is called like the model it was made of, and put into modes, which torch's programs refuse.

    Args:
        program: a program from ``torch.export.load``.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (the model's own arguments and output)
        """The model's output.

        Args:
            *args: the model's arguments.
            **kwargs: the same by name.
        """
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Note the mode; the program was traced in evaluation mode and stays so."""
        self.training = mode
        return self
