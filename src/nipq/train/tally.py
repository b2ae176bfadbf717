"""Loss and metric of an epoch's steps, summed where they are computed: nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nipq.distributed import reduce_min_, reduce_sum_


class Tally:
    """Sums over the samples of an epoch's steps, and the first step whose loss was not finite.

    Args:
        device: Where losses are computed.
        sums: Loss, metric and number of samples of the epoch's earlier steps, of all processes.
    """

    def __init__(self, device: torch.device, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """Start with what is known."""
        self._before = list(sums)
        self._added = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad_step = torch.full((), math.inf, dtype=torch.float64, device=device)  # of all processes
        self.own_bad_step = self.bad_step.clone()

    @torch.no_grad()
    def add(self, loss: Tensor, score: Tensor | float | None, count: int) -> None:
        """Count a step.

        Args:
            loss: Mean over its samples, shape ().
            score: Sum of the metric over its samples; ``None`` if the task has none.
            count: Number of samples.
        """
        self._added[0] += loss.detach().double() * count
        self._added[1] += math.nan if score is None else score
        self._added[2] += count

    @torch.no_grad()
    def watch(self, total: Tensor, step: int) -> Tensor:
        """Remember the first step whose loss is not finite, in any process: averaged gradients carry it to all.

        Args:
            total: What backward starts from, shape ().
            step: The step.

        Returns:
            1.0 from that step on, else 0.0, float32, no dimensions, on the device.
        """
        bad = torch.where(total.isfinite(), math.inf, float(step)).double()
        self.own_bad_step = torch.minimum(self.own_bad_step, bad)
        self.bad_step = torch.minimum(self.bad_step, bad)
        reduce_min_([self.bad_step])
        return self.bad_step.isfinite().float()

    def look(self) -> list[float]:
        """The sums so far, of this process since they were last gathered (waits for the device)."""
        return [a + b for a, b in zip(self._before, self._added.tolist(), strict=True)]

    def gather(self) -> list[float]:
        """The sums so far, of all processes (waits for the device, and for the other processes)."""
        reduce_sum_([self._added])
        self._before = self.look()
        self._added.zero_()
        return self._before
