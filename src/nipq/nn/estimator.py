"""What a quantizer does while it is trained: the noise proxy, or the estimator of a rival method.

Everything else (levels, boundary, bit-width, budget, deployment) is the same for all of them, so that a comparison
changes one word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nipq.config import Method, NoiseKind
from nipq.functional.baselines import (
    lsq_quantize,
    pact_quantize,
    quantize_with_offset,
    running_boundary,
    sawb_boundary,
    untruncated_proxy,
)
from nipq.functional.clipping import max_boundary
from nipq.functional.grid import Grid
from nipq.functional.noise import draw_noise, tempered, true_error
from nipq.functional.proxy import noise_proxy
from nipq.functional.uniform import widened
from nipq.kernels.fused import quantize

Role = Literal["weight", "input"]


@dataclass(frozen=True)
class Estimator:
    """A training method with its switches; see ``nipq.Config`` for what each does.

    Attributes:
        method: whose estimator.
        noise: what the pseudo-quantization noise of ``nipq`` and ``diffq`` is drawn from.
        stochastic_bits: draw a whole bit-width at every training forward (paper Eq. 15).
        clip_after_noise: keep the noise proxy inside the range (not in the paper).
        boundary_correction: add the T4b term to the boundary's gradient (not in the paper).
    """

    method: Method = "nipq"
    noise: NoiseKind = "uniform"
    stochastic_bits: bool = True
    clip_after_noise: bool = False
    boundary_correction: bool = False

    def learns_boundary(self, role: Role) -> bool:
        """Whether the boundary of a weight, or of an input, is a parameter that an optimizer moves."""
        return self.method not in ("diffq", "ste") and (self.method, role) != ("pact", "weight")

    def follows(self, role: Role) -> bool:
        """Whether the method takes that boundary from the tensor itself, by :meth:`follow`."""
        return self.method == "diffq" or (self.method, role) == ("pact", "weight")

    @property
    def learns_bits(self) -> bool:
        """Whether the bit-width gets a gradient."""
        return self.method != "pact"

    @property
    def real_bits(self) -> bool:
        """Whether training sees the bit-width itself, not a whole number near it."""
        return self.method == "diffq"

    @property
    def has_fused_twin(self) -> bool:
        """Whether one kernel does all that training does in phase ``noise``, see ``nipq.kernels.fused``."""
        plain = self.clip_after_noise or self.boundary_correction
        return self.method == "nipq" and self.noise in ("uniform", "empirical") and not plain

    @property
    def learns_offset(self) -> bool:
        """Whether the low end of an input's range is learned."""
        return self.method == "lsq+"

    def follow(self, role: Role, x: Tensor, alpha: Tensor, bits: int, grid: Grid, channel_axis: int | None,
               *, training: bool) -> Tensor | None:  # fmt: skip
        """The boundary that a method takes from the tensor itself, at every forward; None where it does not.

        Args:
            role: weight or input.
            x: the tensor.
            alpha: the present boundary.
            bits: the present whole bit-width.
            grid: which levels.
            channel_axis: axis of the boundaries, or None for one.
            training: inputs are looked at while training only.

        Returns:
            The new boundary, shape of alpha, or None.
        """
        x = x.detach()
        if self.method == "diffq" and role == "weight":
            return max_boundary(x, grid, channel_axis=channel_axis)
        if self.method == "diffq" and training:
            return running_boundary(alpha.detach(), x, grid)
        if self.method == "pact" and role == "weight":
            return sawb_boundary(x, bits, channel_axis=channel_axis)
        return None

    def learn(self, x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, key: Tensor, *, count: int,
              offset: Tensor | None, error_share: Tensor | None) -> Tensor:  # fmt: skip
        """The training forward of phase ``noise``.

        Args:
            x: the tensor.
            alpha: boundary, broadcastable to x.
            bits: whole bit-width, shape (1,).
            grid: which levels.
            key: of the noise, see ``nipq.functional.counter_rng``.
            count: elements of one sample (input) or of one boundary (weight), for LSQ's gradient factor.
            offset: low end of the range where it is learned.
            error_share: share of the true error in the noise, or None for none.

        Returns:
            Shape of x.
        """
        if self.method in ("nipq", "diffq"):
            noise = draw_noise(self.noise, x.detach(), alpha.detach(), bits.detach(), grid, key)
            if error_share is not None:
                noise = tempered(noise, true_error(x.detach(), alpha.detach(), bits.detach(), grid), error_share)
            if self.method == "diffq":
                return untruncated_proxy(x, alpha, bits, noise, grid)
            return noise_proxy(
                x, alpha, bits, noise, grid,
                clip_after_noise=self.clip_after_noise, correct_boundary=self.boundary_correction,
            )  # fmt: skip
        return self.round(x, alpha, bits, grid, count=count, offset=offset)

    def round(self, x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, *, count: int, offset: Tensor | None,
              cap: float = math.inf) -> Tensor:  # fmt: skip
        """The training forward of phase ``round``: the true quantizer, with the method's gradients.

        Args:
            x: the tensor.
            alpha: boundary, broadcastable to x.
            bits: whole bit-width, shape (1,).
            grid: which levels.
            count: elements of one sample (input) or of one boundary (weight).
            offset: low end of the range where it is learned.
            cap: upper end of a ReLU6 in front that was left out; see ``has_fused_twin``.

        Returns:
            Values on the grid, shape of x.
        """
        if offset is not None:
            return quantize_with_offset(widened(x), alpha, offset, bits, count).to(x.dtype)
        if self.method in ("lsq", "lsq+"):
            return lsq_quantize(x, alpha, bits, grid, count, quantize)
        if self.method == "pact":
            return pact_quantize(widened(x), alpha, bits, grid).to(x.dtype)
        return quantize(x, alpha, bits, grid, cap)
