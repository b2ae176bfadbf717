"""A model in the hands of a runtime: which kernels it runs on, and the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nipq.export.compiled import CompiledModel
from nipq.verify.candidate import Subject
from nipq.verify.result import Rung


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
