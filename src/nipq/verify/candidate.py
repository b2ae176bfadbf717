"""Whatever claims to be the trained model: a deployed module, a file, a runtime's compiled form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nipq.verify.metrics import Distance, Evidence, logits_of
from nipq.verify.reference import Observation, run_model
from nipq.verify.result import Rung


class Subject(ABC):
    """One candidate, and what was found about it.

    Args:
        name: what it is called in the result.
        module: the same as something that can be called like the trained model; None if it cannot be run.
        layers: full names of the trained layers, in the order of execution.
        is_file: whether it was read from a file.
    """

    def __init__(self, name: str, module: nn.Module | None, layers: Iterable[str], *, is_file: bool = False) -> None:
        self.name, self.module, self.is_file = name, module, is_file
        self.evidence = {layer: Evidence() for layer in layers}
        self.distance = Distance()

    @abstractmethod
    def static(self) -> Rung:
        """Rung E0; nothing is run."""

    def observe(self, seen: Observation) -> None:
        """Add one piece of data to the evidence.

        Args:
            seen: the trained model on it.
        """
        self.distance.add_kernel_noise(seen.logits, seen.other_kernels)
        if seen.alone is not None:
            self.distance.add_batch_noise(seen.logits, seen.alone)
        self.distance.add(seen.logits, self.run(seen), seen.exact, seen.labels)

    def run(self, seen: Observation) -> Tensor:
        """Logits of the candidate on one piece of data.

        Args:
            seen: the trained model on it.
        """
        assert self.module is not None
        return logits_of(run_model(self.module, seen.inputs))

    @abstractmethod
    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """The rungs above E0.

        Args:
            scores: the task's score of both.
        """


class Unreadable(Subject):
    """A file that could not be read: fails E0 and climbs no further.

    Args:
        name: what it is called in the result.
        reason: why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, None, (), is_file=True)
        self.reason = reason

    def static(self) -> Rung:
        """Rung E0, failed."""
        return Rung("E0 static", "the file can be read", False, {}, self.reason)

    def observe(self, seen: Observation) -> None:
        """Nothing.

        Args:
            seen: not looked at.
        """

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """Nothing.

        Args:
            scores: not looked at.
        """
        del scores
        return []
