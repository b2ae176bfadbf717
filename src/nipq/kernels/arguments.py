"""What a fused noise proxy is told, for any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nipq.functional.grid import Grid


@dataclass(frozen=True)
class ProxySettings:
    """What does not change from step to step.

    Attributes:
        grid: which levels.
        low: fewest bits of the range in which they are learned.
        high: most bits.
        choices: allowed whole bit-widths, ascending.
        stochastic: draw one of the two neighbouring choices, or take the nearest.
        channel_axis: axis of the boundaries where there are several.
        cap: upper end of a ReLU6 in front that was left out, see ``nipq.nn.relu``.
    """

    grid: Grid
    low: float
    high: float
    choices: tuple[int, ...]
    stochastic: bool
    channel_axis: int = 0
    cap: float = math.inf


@dataclass(frozen=True)
class ProxyTensors:
    """What changes from step to step; of the three forms of the bit-width one is there, or ``bit_raw`` and ``bits``.

    Attributes:
        alpha_raw: boundary parameter, float32, shape (1,) or (C,).
        key: of the noise, int64, shape (1,).
        bit_raw: bit-width parameter, float32, shape (1,).
        bits_frozen: fixed bit-width, int64, shape (1,).
        bits: whole bit-width that was drawn before, float32, shape (1,).
        table: errors to draw the noise from, float32; uniform noise without.
        table_count: how many entries of the table count, int64, shape (1,).
    """

    alpha_raw: Tensor
    key: Tensor
    bit_raw: Tensor | None = None
    bits_frozen: Tensor | None = None
    bits: Tensor | None = None
    table: Tensor | None = None
    table_count: Tensor | None = None


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
