"""Limits and running sums of the checks: differences of layers (E1, E3) and of the model's outputs (E2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.prepare.teacher_forcing import HALF_ROUNDINGS, RESULTS, LayerComparison, distances, float_results, larger
from nipq.verify.result import Check

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
        "worst_output": max(
            (layer.error / layer.largest for name, layer in layers.items() if layer.largest and name != RESULTS),
            default=0.0,
        ),
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
        self.largest = self.exact = self.half = 0.0
        self._apart: list[Tensor] = []
        self._batch_noise: list[Tensor] = []
        self._kernel_noise: list[Tensor] = []
        self._own_decisions: list[Tensor] = []
        self._hits: list[tuple[int, int, int]] = []
        #: Shapes of the deployed and the trained model's logits where they first differed.
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, trained: Tensor, deployed: Tensor, exact: Tensor, labels: Tensor | None, half: float = 0.0) -> None:
        """Add one batch.

        Args:
            trained: logits of the trained model in phase ``"round"``.
            deployed: logits of the deployed model.
            exact: logits of the trained model in phase ``"int"``.
            labels: right answers, or None.
            half: one rounding of half precision, where the model computes in it.
        """
        self.half = max(self.half, half)
        deployed, exact = deployed.to(trained.device), exact.to(trained.device)
        if deployed.shape != trained.shape or exact.shape != trained.shape:
            self.shapes = self.shapes or (tuple(deployed.shape), tuple(trained.shape))
            return
        self.samples += len(trained)
        self.largest = larger(self.largest, torch.where(trained.isinf(), 0, trained).abs())
        self.exact = larger(self.exact, distances(exact, deployed))
        self._apart.append(distances(trained, deployed).flatten())
        a, b = _decisions(trained), _decisions(deployed)
        self.decisions += a.numel()
        self.disagreements += int((a != b).sum())
        if labels is not None and labels.shape == a.shape:
            right = labels.to(a.device)
            self._hits.append((int((a == right).sum()), int((b == right).sum()), right.numel()))

    def add_kernel_noise(self, trained: Tensor, other: Tensor) -> None:
        """Add the difference of a batch's logits to those of the same trained model on other kernels."""
        self._own_decisions.append((_decisions(other) != _decisions(trained)).double().flatten())
        self._kernel_noise.append(distances(trained, other).flatten())

    def add_batch_noise(self, trained: Tensor, single: Tensor) -> None:
        """Add the difference of a batch's logits to those of the same samples one by one."""
        self._own_decisions.append((_decisions(single) != _decisions(trained)).double().flatten())
        self._batch_noise.append(distances(trained, single).flatten())

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
        claim = "logits, against the trained model's own noise"
        if self.shapes is not None:
            found, expected = self.shapes
            return Check("E2 noise", claim, False, {}, f"the logits have the shape {found}, trained {expected}")
        largest = self.largest or 1.0
        apart = _mean(self._apart) / largest
        noise = max(_mean(self._batch_noise), _mean(self._kernel_noise)) / largest
        by_chance = max(CHANCE_FLIPS, min(most_by_chance(flips), self.samples // SAMPLES_A_FLIP))
        limit = max(
            TIMES_OWN_NOISE * noise, by_chance * ONE_FLIP / max(self.samples, 1), ROUNDING, HALF_ROUNDINGS * self.half
        )
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
            "agreement": 1 - self.disagreements / max(self.decisions, 1),
        }
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


def logits_place(output: Any) -> int:  # noqa: ANN401  (whatever the model returns)
    """Find the logits among the floating tensors that a model returns.

    Those named ``logits``; else the first that is no single number, as a loss is.

    Args:
        output: tensors alone or in mappings, sequences, dataclasses and other objects.

    Returns:
        Place among :func:`nipq.prepare.teacher_forcing.float_results`.

    Raises:
        ConfigError: if there is none.
    """
    found = float_results(output)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    for place, tensor in enumerate(found):
        if tensor is named:
            return place
    for place, tensor in enumerate(found):
        if tensor.ndim:
            return place
    raise ConfigError(
        f"verify: expected a model that returns floating tensors with a batch axis, found {type(output).__name__} with "
        f"{len(found)} single numbers. Wrap the model so that it returns its logits."
    )


def logits_of(output: Any, place: int) -> Tensor:  # noqa: ANN401  (whatever the model returns)
    """The logits that a model returns, in float32 at least.

    Args:
        output: as for :func:`logits_place`.
        place: what that found in the trained model's output.

    Raises:
        ConfigError: if the output holds fewer tensors.
    """
    found = float_results(output)
    if place >= len(found):
        raise ConfigError(
            f"verify: expected {place + 1} floating tensors at least, as the trained model returns, found "
            f"{len(found)}. Export the model again, with all that it returns."
        )
    return found[place].float() if found[place].itemsize < 4 else found[place]


def _decisions(logits: Tensor) -> Tensor:
    """Largest entry along the classes: the last axis of two or three, the second of images of logits."""
    return logits.argmax(1 if logits.ndim > 3 else -1)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat([part.double() for part in parts]).mean()) if parts else 0.0
