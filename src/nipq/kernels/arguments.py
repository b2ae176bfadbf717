"""Arguments of the noise proxy, for any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nipq.config import NoiseKind
from nipq.functional.grid import Grid, GridKind

#: Numbers of the grids in compiled code.
GRID_NUMBERS: dict[GridKind, int] = {"signed": 0, "unsigned": 1, "shifted": 2, "balanced": 3}


@dataclass(frozen=True)
class ProxySettings:
    """Settings that stay the same from step to step.

    Attributes:
        grid: which levels.
        low: fewest bits of the range in which they are learned.
        high: most bits.
        choices: allowed whole bit-widths, ascending.
        stochastic: draw one of the two neighbouring choices, or take the nearest.
        channel_axis: axis of the clipping ranges where there are several.
        cap: upper end of a ReLU6 in front that was left out, see ``nipq.nn.relu``.
        noise: distribution of the noise, see ``nipq.functional.noise.draw_noise``.
        clip_after_noise: keep the noisy values inside the range.
        range_correction: add the correction to the gradient of the clipping range, see ``nipq.functional.proxy``.
    """

    grid: Grid
    low: float
    high: float
    choices: tuple[int, ...]
    stochastic: bool
    channel_axis: int = 0
    cap: float = math.inf
    noise: NoiseKind = "uniform"
    clip_after_noise: bool = False
    range_correction: bool = False

    @property
    def is_fused(self) -> bool:
        """True if the fused kernels have these settings; plain operations have all."""
        plain = self.clip_after_noise or self.range_correction or self.grid.kind not in GRID_NUMBERS
        return self.noise in ("uniform", "empirical") and not plain


@dataclass(frozen=True)
class ProxyTensors:
    """Tensors that change from step to step; one of the three forms of the bit-width, or ``bit_raw`` and ``bits``.

    Attributes:
        alpha_raw: clipping range parameter, float32, shape (1,) or (C,).
        key: of the noise, int64, shape (1,).
        bit_raw: bit-width parameter, float32, shape (1,).
        bits_frozen: fixed bit-width, int64, shape (1,).
        bits: whole bit-width that was drawn before, float32, shape (1,).
        table: errors to draw the noise from, float32; drawn as the settings say without.
        table_count: how many entries of the table count, int64, shape (1,).
        error_share: share of the true error in the noise, 0 to 1, shape (1,); for plain operations only.
    """

    alpha_raw: Tensor
    key: Tensor
    bit_raw: Tensor | None = None
    bits_frozen: Tensor | None = None
    bits: Tensor | None = None
    table: Tensor | None = None
    table_count: Tensor | None = None
    error_share: Tensor | None = None


def laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with the strides and the type of x.

    Args:
        grad: any layout, shape of x.
        x: dense.

    Returns:
        The gradient itself where nothing had to change.
    """
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)
