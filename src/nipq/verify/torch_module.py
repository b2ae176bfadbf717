"""A deployed module, as ``nipq.convert`` makes and ``nipq.load`` reads it: every rung, to the last bit.

A model in the hands of a runtime: which kernels it runs on, and the task.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export.modules import deployed_layers, deployed_products
from nipq.export.packed_read import WITHOUT_CHECKSUM, load, read_container
from nipq.export.packed_write import CHECKSUM_BYTES, file_bytes
from nipq.export.runtimes import CompiledModel
from nipq.prepare.prepare import restore_
from nipq.verify.candidate import Subject
from nipq.verify.metrics import exact_rung, flips_in, layer_rung, logits_of
from nipq.verify.reference import Observation, compare_codes, recording_codes, run_forced, run_model
from nipq.verify.result import Rung
from nipq.verify.static import file_differences, trained_differences


class DeployedSubject(Subject):
    """A deployed module, and its packed file if it has one.

    Args:
        name: what it is called in the result.
        module: the deployed module.
        layers: full names of the trained layers.
        model: the trained model.
        file: the packed file of the module.
        is_file: whether the module was read from that file.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Iterable[str],
        model: nn.Module,
        file: Path | None = None,
        *,
        is_file: bool = False,
    ) -> None:
        super().__init__(name, module, layers, is_file=is_file)
        self.deployed, self.model, self.file = module, model, file

    def static(self) -> Rung:
        """Rung E0: every number, and the file."""
        found = list(trained_differences(self.model, self.deployed))
        numbers: dict[str, Any] = {"layers": len(deployed_layers(self.deployed))}
        if products := deployed_products(self.deployed):
            numbers["products"] = len(products)
        if self.file is not None:
            numbers["bytes_promised"] = file_bytes(self.deployed)
            try:
                plain = restore_(copy.deepcopy(self.model))
                loaded = load(self.file, plain)
                if read_container(self.file, plain).version == WITHOUT_CHECKSUM:
                    numbers["bytes_promised"] -= CHECKSUM_BYTES
                numbers["bytes_found"] = self.file.stat().st_size
                if numbers["bytes_found"] != numbers["bytes_promised"]:
                    found.append(
                        f"{self.file.name}: {numbers['bytes_found']:,} bytes, promised {numbers['bytes_promised']:,}"
                    )
                found += file_differences(self.deployed, loaded)
            except FileFormatError as error:
                found.append(str(error))
        numbers["differences"] = len(found)
        claim = "integers, scales, zero points, limits" + ("; the file" if self.file is not None else "")
        return Rung("E0 static", claim, not found, numbers, found[0] if found else None)

    def run(self, seen: Observation) -> Tensor:
        """Logits, with the evidence for E1 and E3 on the way.

        Args:
            seen: the trained model on the same data.
        """
        run_forced(self.deployed, seen.calls, self.evidence, partial(run_model, inputs=seen.inputs))
        with recording_codes(self.deployed) as codes:
            found = logits_of(run_model(self.deployed, seen.inputs))
        compare_codes(seen.codes, codes, self.evidence)
        return found

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E1, E2 and E3.

        Args:
            scores: the task's score of both.
        """
        return [
            layer_rung(self.evidence),
            self.distance.rung(scores, flips_in(self.evidence)),
            exact_rung(self.evidence, self.distance.exact),
        ]


class CompiledSubject(Subject):
    """What ``nipq.runtime`` compiled. Its numbers are the file's; its layers cannot be cut apart.

    Args:
        module: the compiled model.
        layers: full names of the trained layers.
    """

    def __init__(self, module: CompiledModel, layers: Iterable[str]) -> None:
        super().__init__(module.runtime, module, layers)
        self.compiled = module

    def static(self) -> Rung:
        """Rung E0: every layer that can be is computed in integers."""
        missing, kernels = self.compiled.float_layers(), self.compiled.kernels
        numbers = {"layers": len(kernels), "integer_kernels": sum(kernel.integer for kernel in kernels)}
        first = next((f"{kernel.name}: {kernel.what}" for kernel in kernels if kernel.name in missing), None)
        return Rung("E0 static", "integer kernels", first is None, numbers, first)

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E2.

        Args:
            scores: the task's score of both.
        """
        return [self.distance.rung(scores)]
