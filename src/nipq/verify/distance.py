"""Rung E2: how far apart two models are, against how far one model is from itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from scipy.special import pdtrik
from torch import Tensor

from nipq.errors import ConfigError
from nipq.verify.result import Rung

#: Times the trained model's own noise that the deployed model may be away from it.
TIMES_OWN_NOISE = 3.0
#: What a single flipped code was seen to move one sample's logits by, relative to the largest logit.
ONE_FLIP = 0.03
#: How often chance may fail a right model; counts are held against what it leaves, not against what is expected.
FALSE_ALARMS = 0.02
#: Flips that may happen to one model and not to the other: where one is expected, more come in 2 % of cases.
CHANCE_FLIPS = 3
#: Samples for each flip at least, however many rung E1 counted: more would hide a fault in what is said to be rounding.
SAMPLES_A_FLIP = 20
#: Float32 roundings of the logits themselves, relative to the largest one.
ROUNDING = 1e-6
#: Share of decisions that must be alike in the long run, unless the trained model's own are not.
AGREEMENT = 0.995


class Distance:
    """Sums over batches of what lies between the logits of the trained and of the deployed model."""

    def __init__(self) -> None:
        self.samples = self.decisions = self.disagreements = self.noise_samples = 0
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
        self.largest = _worse(self.largest, float(trained.abs().max()))
        self.exact = _worse(self.exact, float((deployed - exact).abs().max()))
        self._apart.append((deployed - trained).abs().flatten())
        a, b = _decisions(trained), _decisions(deployed)
        self.decisions += a.numel()
        self.disagreements += int((a != b).sum())
        if labels is not None and labels.shape == a.shape:
            right = labels.to(a.device)
            self._hits.append((int((a == right).sum()), int((b == right).sum()), right.numel()))

    def add_kernel_noise(self, trained: Tensor, other: Tensor) -> None:
        """Add what the trained model is away from itself on other kernels.

        Args:
            trained: logits of a batch.
            other: logits of the same batch on other kernels.
        """
        self._own_decisions.append((_decisions(other) != _decisions(trained)).double().flatten())
        self._kernel_noise.append((other - trained).abs().flatten())

    def add_batch_noise(self, trained: Tensor, single: Tensor) -> None:
        """Add what the trained model is away from itself in batches of one.

        Args:
            trained: logits of a batch.
            single: logits of the same samples one by one.
        """
        self.noise_samples += len(trained)
        self._own_decisions.append((_decisions(single) != _decisions(trained)).double().flatten())
        self._batch_noise.append((single - trained).abs().flatten())

    def scores(self) -> dict[str, float]:
        """Top-1 accuracy of both in per cent; empty without labels."""
        if not self._hits:
            return {}
        trained, deployed, count = (sum(column) for column in zip(*self._hits, strict=True))
        return {"accuracy_trained": 100 * trained / count, "accuracy_deployed": 100 * deployed / count}

    def rung(self, scores: Mapping[str, float], flips: int = 0) -> Rung:
        """Whether the two are as close as the trained model is to itself.

        Args:
            scores: the task's score of both, to be shown with the rest.
            flips: codes that rung E1 found on the other side of a tie, on the same samples. Each layer had the trained
                inputs there, so no fault of a layer before is in them.
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
        return Rung("E2 noise", claim, not faults, numbers | dict(scores), "; ".join(faults) or None)


def most_by_chance(expected: float) -> int:
    """The count that a Poisson count exceeds with a probability of at most ``FALSE_ALARMS``; at least 1.

    Args:
        expected: the count's mean.
    """
    return max(1, math.ceil(float(pdtrik(1 - FALSE_ALARMS, expected))))


def logits_of(output: Any) -> Tensor:  # noqa: ANN401  (whatever the model returns)
    """The first floating tensor that the model returns, in float32 at least.

    Args:
        output: a tensor, or a tuple, list or mapping of such.

    Raises:
        ConfigError: if there is none.
    """
    for tensor in _tensors(output):
        if tensor.is_floating_point():
            return tensor.float() if tensor.itemsize < 4 else tensor
    raise ConfigError(
        f"verify: expected a model that returns floating tensors, found {type(output).__name__}. "
        "Wrap the model so that it returns its logits."
    )


def labels_of(batch: Any) -> Tensor | None:  # noqa: ANN401  (whatever a loader yields)
    """Whole-number labels of a batch: second item of a tuple, or under a usual name of a mapping; None if none."""
    found = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", "label", "target") if key in batch), None)
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def samples_in(inputs: Any) -> int:  # noqa: ANN401  (a model's inputs in any form)
    """Length of the first axis of the first tensor.

    Args:
        inputs: what a model is called with.
    """
    return len(next(tensor for tensor in _tensors(inputs) if tensor.ndim))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _decisions(logits: Tensor) -> Tensor:
    """Largest entry along the classes: the last axis of two or three, the second of images of logits."""
    return logits.argmax(1 if logits.ndim > 3 else -1)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat([part.double() for part in parts]).mean()) if parts else 0.0


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a
