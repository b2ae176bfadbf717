"""What rungs E1 and E3 find layer by layer, and how much of it is too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nipq.verify.result import Rung

#: Largest share of codes that may flip by one level between two layers: sums run in another order.
FLIPS = 1e-4
#: The same for each level of the grid: a float32 sum that is off by so much of the range flips that share of codes.
FLIPS_PER_LEVEL = 4e-7
#: Largest difference of a layer's output, relative to its largest value: some float32 roundings of a long sum.
OUTPUT_TOLERANCE = 1e-5


@dataclass
class Evidence:
    """What E1 and E3 found in one layer, summed over calls and batches.

    Attributes:
        calls_differ: the layers were called differently often, or on different shapes.
        codes: codes looked at.
        wrong: codes that differ on the same input.
        flips: codes that differ on what arrived when the layers before got the trained inputs.
        jump: largest such difference in levels.
        error: largest difference of an output.
        largest: largest magnitude of an output.
        exact_codes: codes that differ between the deployed model and the trained one in phase ``"int"``.
        levels: levels of the grid of its input.
        inexact: whether the format itself may round a code of the same input to the other side.
    """

    calls_differ: bool = False
    codes: int = 0
    wrong: int = 0
    flips: int = 0
    jump: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    exact_codes: int = 0
    levels: int = 0
    inexact: bool = False

    @property
    def allowed(self) -> float:
        """Share of codes that may flip."""
        return max(FLIPS, FLIPS_PER_LEVEL * self.levels)

    def add_codes(self, expected: Tensor, same_input: Tensor, arrived: Tensor) -> None:
        """Add the codes of one call (E1).

        Args:
            expected: whole codes of the trained layer.
            same_input: codes of the other one on the trained input.
            arrived: its codes of what arrived when the layers before got the trained inputs.
        """
        distance = (arrived - expected).abs()
        self.codes += expected.numel()
        self.wrong += int((same_input != expected).sum())
        self.flips += int((distance != 0).sum())
        self.jump = _larger(self.jump, distance)
        if self.inexact:
            self.jump = _larger(self.jump, (same_input - expected).abs())

    def add_output(self, expected: Tensor, found: Tensor) -> None:
        """Add the output of one call (E1)."""
        self.error = _larger(self.error, (found - expected).abs())
        self.largest = _larger(self.largest, expected.abs())

    def layer_fault(self) -> str | None:
        """Why E1 fails here, or None."""
        if self.calls_differ:
            return "called differently often, or on other shapes, than in the trained model"
        if self.wrong > (math.ceil(self.allowed * self.codes) if self.inexact else 0):
            return f"{self.wrong:,} of {self.codes:,} codes differ on the same input"
        if not self.jump <= 1:
            return f"codes of what arrived differ by up to {self.jump:g} levels"
        if self.flips > math.ceil(self.allowed * self.codes):
            return f"{self.flips:,} of {self.codes:,} codes of what arrived flipped, more than {self.allowed:g} of them"
        if not self.error <= OUTPUT_TOLERANCE * self.largest:
            return f"the output differs by {self.error:.3g}, more than {OUTPUT_TOLERANCE:g} of its largest value"
        return None

    def exact_fault(self) -> str | None:
        """Why E3 fails here, or None."""
        if self.calls_differ:
            return "called differently often, or on other shapes, than in the trained model"
        return f"{self.exact_codes:,} codes differ from phase int" if self.exact_codes else None


def flips_in(evidence: Mapping[str, Evidence]) -> int:
    """Codes on the other side of a tie, in all layers.

    Args:
        evidence: by layer.
    """
    return sum(seen.flips for seen in evidence.values())


def layer_rung(evidence: Mapping[str, Evidence]) -> Rung:
    """Rung E1 from what was found.

    Args:
        evidence: by layer, in the order of execution.
    """
    faults = {name: fault for name, seen in evidence.items() if (fault := seen.layer_fault())}
    numbers = {
        "codes": sum(seen.codes for seen in evidence.values()),
        "wrong": sum(seen.wrong for seen in evidence.values()),
        "flips": flips_in(evidence),
        "worst_output": max((seen.error / seen.largest for seen in evidence.values() if seen.largest), default=0.0),
        "layers_at_fault": len(faults),
    }
    return Rung("E1 layers", "each layer on the trained inputs", not faults, numbers, _first(faults))


def exact_rung(evidence: Mapping[str, Evidence], difference: float) -> Rung:
    """Rung E3 from what was found.

    Args:
        evidence: by layer, in the order of execution.
        difference: largest difference of an output.
    """
    faults = {name: fault for name, seen in evidence.items() if (fault := seen.exact_fault())}
    numbers = {
        "codes_apart": sum(seen.exact_codes for seen in evidence.values()),
        "output_difference": difference,
    }
    first = _first(faults) or (None if difference == 0 else "the outputs differ though all codes agree")
    return Rung("E3 exact", "bit for bit in whole numbers", first is None, numbers, first)


def _first(faults: Mapping[str, str]) -> str | None:
    return next((f"{name}: {fault}" for name, fault in faults.items()), None)


def _larger(so_far: float, values: Tensor) -> float:
    """The larger of a number and a tensor's maximum; NaN wins, so that no comparison with a limit passes."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest if math.isnan(largest) or largest > so_far else so_far
