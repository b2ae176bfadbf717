"""The goals set for speed and memory, and what was reached, read out of the result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.variants import EMPIRICAL, FLOAT, UNFOLDED, UNIFORM

Record = dict[str, Any]


class Goal(NamedTuple):
    """One goal.

    Attributes:
        name: what is limited.
        limit: the most that was to be reached.
        file: result file that knows.
        found: reads the number from it; KeyError or StopIteration when it was not measured.
        digits: to show.
    """

    name: str
    limit: float
    file: str
    found: Callable[[Record], float]
    digits: int = 2


def step(network: str, variant: str = UNIFORM, base: str = FLOAT, threads: str = "1") -> Callable[[Record], float]:
    """Ratio of two variants' training steps, each in its faster memory format."""

    def found(content: Record) -> float:
        rows = content["networks"][network]["threads"][threads]
        ours, theirs = (min(cell["ratio"][1] for cell in rows[name].values()) for name in (variant, base))
        return float(ours / theirs)

    return found


def saved(network: str, variant: str) -> Callable[[Record], float]:
    """Ratio of the bytes kept for backward, in the format in which float is faster."""

    def found(content: Record) -> float:
        part = content["networks"][network]
        layout = part["reference"]
        return float(part["memory"][f"{variant} | {layout}"]["saved"] / part["memory"][f"{FLOAT} | {layout}"]["saved"])

    return found


def compiled(network: str) -> Callable[[Record], float]:
    """Ratio of compiled steps."""
    return lambda content: float(content["networks"][network]["rows"][UNIFORM]["ratio"][1])


def element(threads: int) -> Callable[[Record], float]:
    """Ratio of the noise proxy to a copy and an add, 4 million numbers of float32."""

    def found(content: Record) -> float:
        wanted = {"elements": 1 << 22, "dtype": "float32", "threads": threads}
        case = next(case for case in content["cases"] if wanted.items() <= case.items())
        return float(case["rows"][UNIFORM]["ratio"][1])

    return found


def call(content: Record) -> float:
    """Microseconds of a call."""
    return float(content["fixed"][UNIFORM][1])


NETWORKS = {"resnet18": "ResNet-18", "mobilenet_v2": "MobileNet-v2", "encoder": "encoder"}
STEPS = {"resnet18": 1.10, "mobilenet_v2": 1.25, "encoder": 1.15}
THREADS = {1: "one thread", 2: "two threads"}
GOALS = (
    *(Goal(f"{NETWORKS[net]}, step / float step, {shown}", most, "training_step", step(net, threads=str(count)))
      for net, most in STEPS.items() for count, shown in THREADS.items()),
    *(Goal(f"{NETWORKS[net]}, step with empirical noise / with uniform, {shown}", 1.3, "training_step",
           step(net, EMPIRICAL, UNIFORM, str(count)))
      for net in NETWORKS for count, shown in THREADS.items()),
    *(Goal(f"{shown}, compiled step / compiled float step, one thread", 1.15, "compiled", compiled(net))
      for net, shown in NETWORKS.items()),
    Goal("MobileNet-v2, saved bytes / float's, ReLU not folded", 1.05, "training_step",
         saved("mobilenet_v2", UNFOLDED)),
    Goal("MobileNet-v2, saved bytes / float's", 0.80, "training_step", saved("mobilenet_v2", UNIFORM)),
    *(Goal(f"element, forward + backward / (copy + add), {shown}", 1.5, "elements", element(count))
      for count, shown in THREADS.items()),
    Goal("one call, forward + backward, microseconds", 60, "elements", call, 0),
)  # fmt: skip


def goals_table(records: Mapping[str, Record]) -> str:
    """Each goal that was measured, on one line; nothing if none was.

    Args:
        records: result files by name.
    """
    lines = []
    for goal in GOALS:
        try:
            found = goal.found(records[goal.file])
        except (KeyError, StopIteration):
            continue
        verdict = "reached" if round(found, goal.digits) <= goal.limit else "**missed**"
        lines.append(f"| {goal.name} | {goal.limit:.{goal.digits}f} | {found:.{goal.digits}f} | {verdict} |")
    head = ["| on a CPU | goal, at most | found | |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""
