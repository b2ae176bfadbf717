"""Fails when training became slow: ratios on small tensors, with room for a busy machine. Under a minute.

python -m benchmarks.gate

Numbers to quote come from the other files here; the limits below are two to three times those, so that only a kernel
that is no longer used, or several passes over memory too many, are noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import elements
from benchmarks.networks import NETWORKS
from benchmarks.timing import interleaved, ratio
from benchmarks.variants import FLOAT, UNIFORM, prepared
from nipq.kernels.cpu import available

ELEMENTS, ROUNDS = 1 << 22, 9


class Check(NamedTuple):
    """One ratio and its limit.

    Attributes:
        name: what is compared.
        limit: above this it fails.
        measure: the ratio.
    """

    name: str
    limit: float
    measure: Callable[[], float]

    def failure(self) -> str | None:
        """Measure, say so, and return a message if the ratio is above its limit.

        A busy machine can spoil a measurement, so a ratio that is too high is measured once more and the lower counts.
        """
        found = self.measure()
        if found > self.limit:
            found = min(found, self.measure())
        print(f"{self.name}: {found:.2f} (limit {self.limit:g})", flush=True)
        if found <= self.limit:
            return None
        return (
            f"{self.name}: expected at most {self.limit:g}, found {found:.2f}. "
            "Look at what changed in src/nipq/kernels or src/nipq/nn; python -m benchmarks.elements shows more."
        )


def element_ratio(name: str) -> Callable[[], float]:
    """Forward and backward of a function of ``benchmarks.elements`` in units of a copy and an add."""

    def measure() -> float:
        case = elements.measure(ELEMENTS, "float32", 1, ROUNDS, (name,))
        return float(case["rows"][name]["ratio"][1])

    return measure


def call_ratio() -> float:
    """Cost of a call on a tiny tensor, in units of a ReLU's."""
    costs = elements.fixed_cost(ROUNDS, ("ReLU", "nipq"))
    return costs["nipq"][1] / costs["ReLU"][1]


def step_ratio() -> float:
    """A training step of MobileNet-v2 in units of the float step."""
    network = NETWORKS["mobilenet_v2"]._replace(batch=8)
    tasks = {variant: prepared(variant, network, "channels_last").step for variant in (FLOAT, UNIFORM)}
    samples = interleaved(tasks, ROUNDS, large=True)
    return ratio(samples[UNIFORM], samples[FLOAT]).median


CHECKS = (
    Check("noise proxy, forward + backward / (copy + add)", 4.0, element_ratio("nipq")),
    Check("true quantizer, forward + backward / (copy + add)", 4.0, element_ratio("nipq, rounding")),
    Check("noise proxy, empirical, forward + backward / (copy + add)", 16.0, element_ratio("nipq, empirical noise")),
    Check("noise proxy, one call / one call of ReLU", 12.0, call_ratio),
    Check("MobileNet-v2, training step / float step", 2.0, step_ratio),
)


def main(checks: tuple[Check, ...] = CHECKS) -> int:
    """Check all; 0 if all are kept, or if there is nothing to check."""
    if not available():
        print("speed gate skipped: there are no compiled kernels here (no C++ compiler, or NIPQ_KERNELS=0).")
        return 0
    torch.set_num_threads(1)
    failures = [failure for check in checks if (failure := check.failure()) is not None]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
