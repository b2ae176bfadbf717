"""A ``torch.export`` program. It is code, and torch's own loader runs pickles: a file that differs is never loaded.

So the file is compared with the program that the trained model gives here and now, number by number and node by node.
Only if nothing differs, there is something to run: that very program.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from nipq.errors import FileFormatError
from nipq.export.program import program_bytes
from nipq.prepare.trace import ExampleInputs
from nipq.verify.candidate import Subject
from nipq.verify.metrics import exact_rung
from nipq.verify.result import Rung
from nipq.verify.static import members, read

GRAPH = "models/model.json"
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"
#: What differs from one export to the next and means nothing: sizes of the example, names of the modules' classes.
MEANINGLESS = frozenset({"hint", "metadata"})
#: Members that only number the file.
NUMBERS = frozenset({".data/serialization_id"})


class ProgramModule(nn.Module):
    """A program that is called like the model it was made of, and put into modes, which torch's programs refuse.

    Args:
        program: what ``torch.export.load`` returned.
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
        """Note the mode; the program was traced in evaluation mode and stays so.

        Args:
            mode: whether training is asked for.
        """
        self.training = mode
        return self


class ProgramSubject(Subject):
    """A ``.pt2`` file that ``nipq.export`` wrote.

    Args:
        path: the file.
        deployed: what ``nipq.convert`` makes of the trained model, on the CPU.
        layers: full names of the trained layers.
        example: one batch.

    Raises:
        FileFormatError: if it cannot be read.
    """

    def __init__(self, path: Path, deployed: nn.Module, layers: Iterable[str], example: ExampleInputs) -> None:
        promised, _ = program_bytes(deployed, example)
        data = read(path, len(promised))
        ours, theirs = (_by_name(members(given, path)) for given in (promised, data))
        self.differences = list(_differences(ours, theirs, path))
        module = ProgramModule(torch.export.load(io.BytesIO(promised)))
        super().__init__(path.name, module, layers, is_file=True)
        self.size = len(data)

    def static(self) -> Rung:
        """Rung E0: every number and every node."""
        numbers = {"bytes_found": self.size, "differences": len(self.differences)}
        first = self.differences[0] if self.differences else None
        return Rung("E0 static", "every number and every node of the program", first is None, numbers, first)

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E2 and E3, if the program is the one that was run.

        Args:
            scores: the task's score of both.
        """
        if self.differences:
            return []
        return [self.distance.rung(scores), exact_rung({}, self.distance.exact)]


def _by_name(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members without the name of the archive before theirs."""
    return {name.partition("/")[2]: data for name, data in found.items()}


def _differences(ours: Mapping[str, bytes], theirs: Mapping[str, bytes], path: Path) -> Iterator[str]:
    """Every difference of two programs in words."""
    graphs = [_json(side, GRAPH, path) for side in (ours, theirs)]
    configs = [_json(side, WEIGHTS_CONFIG, path).get("config", {}) for side in (ours, theirs)]
    yield from _tensor_differences(ours, theirs, configs)
    made, found = (graph.get("torch_version") for graph in graphs)
    if made != found:
        yield f"written by torch {found}, compared with a program of torch {made}: export it again with this one"
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


def _meaning(value: Any) -> Any:  # noqa: ANN401  (any JSON)
    """A value without what means nothing."""
    if isinstance(value, dict):
        return {key: _meaning(inner) for key, inner in value.items() if key not in MEANINGLESS}
    return [_meaning(inner) for inner in value] if isinstance(value, list) else value


def _layer_of(node: dict[str, Any]) -> str:
    """Full name of the module that a node came from."""
    stack = str(node.get("metadata", {}).get("nn_module_stack", "")).split(";")
    return next((part.split(",")[1] for part in reversed(stack) if part.count(",") > 1), "") or "the model"
