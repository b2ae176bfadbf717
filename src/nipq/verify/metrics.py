"""Limits and running sums of the checks: differences of layers (E1, E3) and of the model's outputs (E2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.prepare.batches import tensors_in
from nipq.verify.result import Check

#: E1: largest share of codes that may flip by one level between two layers, as sums run in another order.
FLIPS = 1e-4
#: The same for each level of the grid: a float32 sum that is off by so much of the range flips that share of codes.
FLIPS_PER_LEVEL = 4e-7
#: E1: largest difference of a layer's output relative to its largest value: some float32 roundings of a long sum.
OUTPUT_TOLERANCE = 1e-5
#: E2: times the trained model's own noise that the deployed model's logits may be away from its logits.
TIMES_OWN_NOISE = 3.0
#: E2: change of one sample's logits that a single flipped code was seen to make, relative to the largest logit.
ONE_FLIP = 0.03
#: E2: how often chance may fail a correct model; counts are held against this quantile, not against their mean.
FALSE_ALARMS = 0.02
#: E2: flips that may happen to one model and not to the other: where one is expected, more come in 2 % of cases.
CHANCE_FLIPS = 3
#: E2: samples for each flip at least, however many E1 counted: more would hide a fault in what is said to be rounding.
SAMPLES_A_FLIP = 20
#: E2: float32 roundings of the logits themselves, relative to the largest one.
ROUNDING = 1e-6
#: E2: share of decisions that must be alike in the long run, unless the trained model's own are not.
AGREEMENT = 0.995

_CALLS_DIFFER = "called differently often, or on other shapes, than in the trained model"


@dataclass
class LayerComparison:
    """Differences of one layer, product or operand (E1, E3), summed over calls and batches.

    Attributes:
        calls_differ: whether the layer was called differently often, or on different shapes.
        codes: codes compared.
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
            same_input: codes of the deployed layer on the trained input.
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
        """The reason for which E1 fails here, or None."""
        if self.calls_differ:
            return _CALLS_DIFFER
        most = math.ceil(self.allowed * self.codes)
        if self.wrong > (most if self.inexact else 0):
            return f"{self.wrong:,} of {self.codes:,} codes differ on the same input"
        if not self.jump <= 1:
            return f"codes of what arrived differ by up to {self.jump:g} levels"
        if self.flips > most:
            return f"{self.flips:,} of {self.codes:,} codes of what arrived flipped, more than {self.allowed:g} of them"
        if not self.error <= OUTPUT_TOLERANCE * self.largest:
            return f"the output differs by {self.error:.3g}, more than {OUTPUT_TOLERANCE:g} of its largest value"
        return None

    def exact_fault(self) -> str | None:
        """The reason for which E3 fails here, or None."""
        if self.calls_differ:
            return _CALLS_DIFFER
        return f"{self.exact_codes:,} codes differ from phase int" if self.exact_codes else None


def flips_in(layers: Mapping[str, LayerComparison]) -> int:
    """Number of codes that were rounded to the other of two levels, in all layers."""
    return sum(layer.flips for layer in layers.values())


def layer_check(layers: Mapping[str, LayerComparison]) -> Check:
    """Level E1: each layer on the trained inputs; layers in the order of execution."""
    faults = {name: fault for name, layer in layers.items() if (fault := layer.layer_fault())}
    numbers = {
        "codes": sum(layer.codes for layer in layers.values()),
        "wrong": sum(layer.wrong for layer in layers.values()),
        "flips": flips_in(layers),
        "worst_output": max((layer.error / layer.largest for layer in layers.values() if layer.largest), default=0.0),
        "layers_at_fault": len(faults),
    }
    return Check("E1 layers", "each layer on the trained inputs", not faults, numbers, _first(faults))


def exact_check(layers: Mapping[str, LayerComparison], difference: float) -> Check:
    """Level E3: codes equal to the trained model's in phase ``"int"``, and outputs without a difference."""
    faults = {name: fault for name, layer in layers.items() if (fault := layer.exact_fault())}
    apart = sum(layer.exact_codes for layer in layers.values())
    first = _first(faults) or (None if difference == 0 else "the outputs differ though all codes agree")
    numbers = {"codes_apart": apart, "output_difference": difference}
    return Check("E3 exact", "bit for bit in whole numbers", first is None, numbers, first)


def _first(faults: Mapping[str, str]) -> str | None:
    return next((f"{name}: {fault}" for name, fault in faults.items()), None)


class OutputComparison:
    """Differences between the logits of trained and deployed model (E2), summed over batches."""

    def __init__(self) -> None:
        self.samples = self.decisions = self.disagreements = 0
        self.largest = self.exact = 0.0
        self._apart: list[Tensor] = []
        self._batch_noise: list[Tensor] = []
        self._kernel_noise: list[Tensor] = []
        self._own_decisions: list[Tensor] = []
        self._hits: list[tuple[int, int, int]] = []

    def add(self, trained: Tensor, deployed: Tensor, exact: Tensor, labels: Tensor | None) -> None:
        """Add one batch.

        Args:
            trained: logits of the trained model in phase ``"round"``.
            deployed: logits of the deployed model.
            exact: logits of the trained model in phase ``"int"``.
            labels: right answers, or None.
        """
        deployed, exact = deployed.to(trained.device), exact.to(trained.device)
        self.samples += len(trained)
        self.largest = _larger(self.largest, trained.abs())
        self.exact = _larger(self.exact, (deployed - exact).abs())
        self._apart.append((deployed - trained).abs().flatten())
        a, b = _decisions(trained), _decisions(deployed)
        self.decisions += a.numel()
        self.disagreements += int((a != b).sum())
        if labels is not None and labels.shape == a.shape:
            right = labels.to(a.device)
            self._hits.append((int((a == right).sum()), int((b == right).sum()), right.numel()))

    def add_kernel_noise(self, trained: Tensor, other: Tensor) -> None:
        """Add the difference of a batch's logits to those of the same trained model on other kernels."""
        self._own_decisions.append((_decisions(other) != _decisions(trained)).double().flatten())
        self._kernel_noise.append((other - trained).abs().flatten())

    def add_batch_noise(self, trained: Tensor, single: Tensor) -> None:
        """Add the difference of a batch's logits to those of the same samples one by one."""
        self._own_decisions.append((_decisions(single) != _decisions(trained)).double().flatten())
        self._batch_noise.append((single - trained).abs().flatten())

    def accuracies(self) -> dict[str, float]:
        """Top-1 accuracy of both models in per cent; empty without labels."""
        if not self._hits:
            return {}
        trained, deployed, count = (sum(column) for column in zip(*self._hits, strict=True))
        return {"accuracy_trained": 100 * trained / count, "accuracy_deployed": 100 * deployed / count}

    def check(self, scores: Mapping[str, float], flips: int = 0) -> Check:
        """Level E2: whether the deployed model is as close to the trained one as that is to itself.

        Args:
            scores: score of both models on the task, to be shown with the rest.
            flips: flipped codes that E1 counted on the same samples. Each layer had the trained inputs there, so no
                fault of a layer before is in them.
        """
        largest = self.largest or 1.0
        apart = _mean(self._apart) / largest
        noise = max(_mean(self._batch_noise), _mean(self._kernel_noise)) / largest
        by_chance = max(CHANCE_FLIPS, min(most_by_chance(flips), self.samples // SAMPLES_A_FLIP))
        limit = max(TIMES_OWN_NOISE * noise, by_chance * ONE_FLIP / self.samples, ROUNDING)
        allowed = max(1 - AGREEMENT, TIMES_OWN_NOISE * _mean(self._own_decisions))
        faults = []
        if not apart <= limit:
            faults.append(f"the logits are {apart:.3g} of the largest apart, more than {limit:.3g}")
        most = most_by_chance(allowed * self.decisions)
        if self.disagreements > most:
            faults.append(
                f"{self.disagreements:,} of {self.decisions:,} decisions differ, more than the {most:,} that chance "
                f"makes of {allowed:.2%}"
            )
        numbers = {
            "samples": self.samples,
            "distance": apart,
            "own_noise": noise,
            "limit": limit,
            "agreement": 1 - self.disagreements / self.decisions,
        }
        claim = "logits, against the trained model's own noise"
        return Check("E2 noise", claim, not faults, numbers | dict(scores), "; ".join(faults) or None)


def most_by_chance(expected: float) -> int:
    """The count that a Poisson count of this mean exceeds with a probability of ``FALSE_ALARMS``; at least 1."""
    mean = torch.tensor(expected, dtype=torch.float64)
    low, high = 0, int(expected + 10 * math.sqrt(expected)) + 10
    while high - low > 1:
        middle = (low + high) // 2
        within = torch.special.gammaincc(torch.tensor(middle + 1, dtype=torch.float64), mean)  # P(count <= middle)
        low, high = (low, middle) if within >= 1 - FALSE_ALARMS else (middle, high)
    return high


def logits_of(output: Any) -> Tensor:  # noqa: ANN401  (whatever the model returns)
    """The first floating tensor with axes that the model returns, in float32 at least; a loss in front has none.

    Args:
        output: a tensor, or a tuple, list or mapping of such.

    Raises:
        ConfigError: if there is none.
    """
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.ndim:
            return tensor.float() if tensor.itemsize < 4 else tensor
    raise ConfigError(
        f"verify: expected a model that returns floating tensors, found {type(output).__name__}. "
        "Wrap the model so that it returns its logits."
    )


def _decisions(logits: Tensor) -> Tensor:
    """Largest entry along the classes: the last axis of two or three, the second of images of logits."""
    return logits.argmax(1 if logits.ndim > 3 else -1)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat([part.double() for part in parts]).mean()) if parts else 0.0


def _larger(so_far: float, values: Tensor) -> float:
    """The larger of a number and a tensor's maximum; NaN wins, so that no comparison with a limit passes."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest if math.isnan(largest) or largest > so_far else so_far
