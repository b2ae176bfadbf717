"""Plain arrays: every array and fact against the trained ones, then each layer and product in NumPy's whole numbers.

The file holds no wiring, so there is no network to run: E1 and E3 are about one layer at a time, E2 does not exist.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export import arrays as reference
from nipq.export.arrays import FACTS, PRODUCT, arrays_bytes
from nipq.export.modules import DeployedLayer, deployed_layers, deployed_products
from nipq.prepare.layer_table import OPERANDS, place_of
from nipq.prepare.trace import ExampleInputs
from nipq.verify.candidate import Subject
from nipq.verify.metrics import layer_rung
from nipq.verify.reference import Observation, run_forced, run_model
from nipq.verify.result import Rung
from nipq.verify.static import differences, members, read

#: Samples that are computed in NumPy: whole numbers are slow there.
SAMPLES = 2


class ArraysSubject(Subject):
    """An NPZ file that ``nipq.export`` wrote.

    Args:
        path: the file.
        deployed: what ``nipq.convert`` makes of the trained model, on the CPU.
        layers: full names of the trained layers.
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

    def static(self) -> Rung:
        """Rung E0: every array, bit for bit, and every fact."""
        first = next(iter(self.wrong.values()), None)
        if first is None and self.bytes[0] != self.bytes[1]:
            first = f"{self.bytes[1]:,} bytes, promised {self.bytes[0]:,}"
        numbers = {
            "arrays": len(self.found) - 1,
            "bytes_promised": self.bytes[0],
            "bytes_found": self.bytes[1],
            "differences": len(self.wrong),
        }
        return Rung("E0 static", "every array and fact", first is None, numbers, first)

    def _differences(self) -> Iterator[tuple[str, str]]:
        """What is wrong, by the layer or array that it is about."""
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

    def observe(self, seen: Observation) -> None:
        """Compute each layer and product on a few trained inputs, once.

        Args:
            seen: the trained model on one piece of data.
        """
        if self.computed:
            return
        exact = self._exact_outputs(seen)
        for name, facts in self.facts[0].items():
            # Facts that differ may be made to hang: what is not sound is not run.
            same = name in self.facts[1] and facts == self.facts[1][name]
            parts = {part: self.found.get(f"{key}.npy", b"") for part, key in facts["arrays"].items()}
            ours = {part: self.promised[f"{key}.npy"] for part, key in facts["arrays"].items()}
            same = same and all(_header(parts[part]) == _header(ours[part]) for part in parts)
            if not same:
                self.evidence[name].calls_differ = True
            elif facts["kind"] == PRODUCT or (facts["input_bits"] is not None and not facts["custom"]):
                layer = facts | {part: _array(data) for part, data in parts.items()}
                self.computed[name] = max(
                    (self._compute(name, layer, seen, call, y) for call, y in enumerate(exact[name])), default=0.0
                )

    def _compute(self, name: str, layer: dict[str, Any], seen: Observation, call: int, exact: Tensor) -> float:
        """Add one call to the evidence; largest difference from the deployed layer's output."""
        inputs, few = {name: layer}, slice(SAMPLES)
        if layer["kind"] == PRODUCT:
            inputs = {place_of(name, part): reference.operand(layer, part) for part in OPERANDS}
            few = _samples(exact, *(seen.calls.inputs[place][call] for place in inputs))
        given = [seen.calls.inputs[place][call][few].cpu().float().numpy() for place in inputs]
        with np.errstate(all="ignore"):  # numbers that differ may be anything
            for (place, facts), x in zip(inputs.items(), given, strict=True):
                codes = torch.from_numpy(reference.codes(facts, x).astype(np.float32))
                self.evidence[place].add_codes(seen.calls.codes[place][call][few].cpu(), codes, codes)
            output = torch.from_numpy(reference.run(layer, *given))
        self.evidence[name].add_output(seen.calls.outputs[name][call][few].cpu(), output)
        return float((output - exact[few]).abs().max()) if output.numel() else 0.0

    def _exact_outputs(self, seen: Observation) -> dict[str, list[Tensor]]:
        """Outputs of the deployed layers and products on the trained inputs."""
        kept: dict[str, list[Tensor]] = defaultdict(list)
        layers = {name: x for name, x in deployed_layers(self.deployed).items() if isinstance(x, DeployedLayer)}
        handles = [
            module.register_forward_hook(lambda _module, _args, y, name=name: kept[name].append(y.clone()))
            for name, module in (layers | deployed_products(self.deployed)).items()
        ]
        try:
            run_forced(self.deployed, seen.calls, {}, partial(run_model, inputs=seen.inputs))
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E1 and E3.

        Args:
            scores: there are none without a network.
        """
        del scores
        first = next((f"{name}: the output differs by {far:.3g}" for name, far in self.computed.items() if far), None)
        worst = max(self.computed.values(), default=0.0)
        numbers = {"layers_computed": len(self.computed), "layers": len(self.facts[0]), "output_difference": worst}
        exact = Rung("E3 exact", "each layer in NumPy, bit for bit", first is None, numbers, first)
        return [layer_rung(self.evidence), exact]


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
