"""Candidates: deployed modules, files and compiled models that are compared with the trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nipq.prepare.teacher_forcing import LayerComparison
from nipq.verify.metrics import OutputComparison, logits_of
from nipq.verify.reference import ReferenceRun, run_model
from nipq.verify.result import Check


class Candidate(ABC):
    """One artifact, and what comparing it with the trained model found so far.

    Args:
        name: name of the artifact in the result.
        module: the artifact as a module that is called like the trained model; None if it cannot be run.
        layers: quantization points, layers and products of the trained model, in the order of execution.
        is_file: whether it was read from a file.
    """

    def __init__(self, name: str, module: nn.Module | None, layers: Iterable[str], *, is_file: bool = False) -> None:
        self.name, self.module, self.is_file = name, module, is_file
        self.layers = {layer: LayerComparison() for layer in layers}
        self.output = OutputComparison()

    @abstractmethod
    def static_check(self) -> Check:
        """Level E0: compare stored numbers; nothing is run."""

    def compare(self, reference: ReferenceRun) -> None:
        """Run the candidate on one piece of data and add the differences found.

        Args:
            reference: the trained model on the same data.
        """
        self.output.add_kernel_noise(reference.logits, reference.other_kernels)
        if reference.alone is not None:
            self.output.add_batch_noise(reference.logits, reference.alone)
        kind = reference.calls.results[reference.place].dtype
        half = torch.finfo(kind).eps if kind.itemsize < 4 else max((x.half for x in self.layers.values()), default=0.0)
        self.output.add(reference.logits, self.logits(reference), reference.exact, reference.labels, half)

    def logits(self, reference: ReferenceRun) -> Tensor:
        """Logits of the candidate on one piece of data; candidates with layers compare those on the way.

        Args:
            reference: the trained model on the same data.
        """
        assert self.module is not None
        return logits_of(run_model(self.module, reference.inputs), reference.place)

    @abstractmethod
    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """The checks above E0 that this kind of artifact can be held to.

        Args:
            scores: score of both models on the task.
        """


class UnreadableCandidate(Candidate):
    """A file that could not be read: fails E0, and no other check is made.

    Args:
        name: name of the file.
        reason: why it could not be read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, None, (), is_file=True)
        self.reason = reason

    def static_check(self) -> Check:
        """Level E0, failed."""
        return Check("E0 static", "the file can be read", False, {}, self.reason)

    def compare(self, reference: ReferenceRun) -> None:
        """Do nothing."""

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """No checks."""
        del scores
        return []


def differences(
    name: str, expected: Mapping[str, Any], found: Mapping[str, Any], first: str = "trained", second: str = "deployed"
) -> Iterator[str]:
    """Compare two sides' facts about one layer, tensors bit for bit.

    Args:
        name: full name of the layer, or nothing.
        expected: facts of one side by name: tensors, numbers or strings.
        found: facts of the other side.
        first: name of the one side in messages.
        second: name of the other side.

    Yields:
        One sentence per fact that differs or that only one side has.
    """
    where = f"{name}: " if name else ""
    for key in [*expected, *(key for key in found if key not in expected)]:
        if key not in expected or key not in found:
            yield f"{where}{key}: only {first if key in expected else second}"
            continue
        a, b = expected[key], found[key]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            text = _tensor_difference(a.detach(), b.detach().to(a.device))
            if text:
                yield f"{where}{key}: {text} ({first} against {second})"
        elif a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            yield f"{where}{key}: {first} {a}, {second} {b}"


def _tensor_difference(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    wide = torch.promote_types(a.dtype, b.dtype)
    differs = a.to(wide) != b.to(wide)
    if not bool(differs.any()):
        return None
    ours, theirs = (values[differs][0].item() for values in (a, b))
    return f"{int(differs.sum()):,} of {a.numel():,} differ, the first {ours:.9g} against {theirs:.9g}"
