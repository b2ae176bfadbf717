"""Quantization grids: number of levels, step size, zero point, and range of codes and values.

The only place that raises 2 to a bit-width. Training, evaluation, calibration and export all take the step from here,
so they cannot disagree about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nipq.errors import ConfigError

GridKind = Literal["signed", "unsigned", "shifted"]

#: Fewest bits of a grid: a signed one with a single bit has no level but zero.
MIN_BITS = 2


@dataclass(frozen=True)
class Grid:
    """Levels of a quantizer: signed, unsigned, or shifted.

    ``signed``: -n..n times the step, symmetric, zero included, for weights and signed activations.
    ``unsigned``: 0..n times the step, for what follows a ReLU.
    ``shifted``: n + 1 levels of which the one with code 0 is exactly zero, z of them below it, for activations with a
    short negative tail (h-swish reaches down to -3/8, SiLU to -0.2785, GELU to -0.17).

    Paper: the quantizer of section 3; the shift is Q3 in docs/internals/paper-map.md.

    Args:
        kind: ``"signed"``, ``"unsigned"`` or ``"shifted"``.
        shift: minus the lowest value to represent, units of x, >= 0; only for ``"shifted"``.

    Raises:
        ConfigError: if the kind is unknown, or the shift is negative, not finite, or given for another kind.

    Example:
        >>> Grid("shifted", 0.375)
        Grid(kind='shifted', shift=0.375)
    """

    kind: GridKind
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no formula below is made for."""
        if self.kind not in get_args(GridKind):
            raise ConfigError(
                f"expected a grid kind out of {', '.join(get_args(GridKind))}; found {self.kind!r}. Choose one of them."
            )
        if not (math.isfinite(self.shift) and self.shift >= 0):
            raise ConfigError(
                f"expected a finite shift >= 0 (minus the lowest value to represent); found {self.shift}. "
                "Give 0.375 for h-swish, 0.2785 for SiLU."
            )
        if self.shift and self.kind != "shifted":
            raise ConfigError(
                f"expected no shift on a {self.kind} grid; found {self.shift}. Use kind='shifted' or leave it out."
            )


#: Signed grid, codes -n..n.
SIGNED = Grid("signed")
#: Unsigned grid, codes 0..n.
UNSIGNED = Grid("unsigned")


def levels(bits: Tensor | float, grid: Grid) -> Tensor:
    """Number n of steps between zero and the far end of the range.

    n = 2^(b-1) - 1 when signed, 2^b - 1 when unsigned or shifted. alpha is n steps, from zero to the high end when
    signed, from the low end to the high one otherwise, so a signed grid has 2n + 1 = 2^b - 1 levels, the others
    n + 1 = 2^b.

    Paper: the quantizer of section 3; see docs/internals/paper-map.md.

    Args:
        bits: bit-width, >= 2, whole or fractional, any shape.
        grid: which levels.

    Returns:
        n, shape of bits, differentiable in bits; whole numbers for whole bits.

    Raises:
        ConfigError: if any bit-width is below 2. Looked at only where looking is free: on the CPU, outside compiled
            code. (A check elsewhere would wait for the device in every forward.)

    Example:
        >>> levels(torch.tensor([2.0, 4.0]), SIGNED), levels(4, UNSIGNED)
        (tensor([1., 7.]), tensor(15.))
    """
    bits = torch.as_tensor(bits)
    if not torch.compiler.is_compiling() and bits.device.type == "cpu" and bool((bits < MIN_BITS).any()):
        raise ConfigError(
            f"expected bit-widths of at least {MIN_BITS}; found {float(bits.min()):g}. "
            "A signed grid of 1 bit has no level but zero; raise the lower end of the bit range."
        )
    return torch.exp2(bits - 1 if grid.kind == "signed" else bits) - 1


def step_size(alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """Distance between neighbouring levels.

    step = alpha / n(bits), by true division; its derivative in bits is -alpha ln2 2^(b-1) / n^2 when signed and
    -alpha ln2 2^b / n^2 otherwise.

    Paper: the quantizer of section 3; see docs/internals/paper-map.md.

    Args:
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, whole or fractional, broadcastable to alpha.
        grid: which levels.

    Returns:
        The step, units of x, shape of alpha and bits broadcast together, differentiable in both.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> step_size(torch.tensor([3.5]), torch.tensor([4.0]), SIGNED)
        tensor([0.5000])
    """
    return alpha / levels(bits, grid)


def zero_point(alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """Number z of levels below zero on a shifted grid.

    z = round(shift / step), clamped to 0..n; a whole number in training and evaluation alike, so that zero is a
    level (zero padding stays exact) and no runtime rounds it again. It counts as a constant for the gradient.

    Paper: not in it; Q3 and Q4 in docs/internals/paper-map.md.

    Args:
        alpha: length of the range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        z, a whole number held as a float, shape of the step, without gradient; zero unless the grid is shifted.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> zero_point(torch.tensor([6.0]), torch.tensor([4.0]), Grid("shifted", 0.375))
        tensor([1.])
    """
    with torch.no_grad():
        n = levels(bits, grid)
        step = alpha / n
        if grid.kind != "shifted":
            return torch.zeros_like(step)
        return torch.minimum(torch.round(grid.shift / step), n.floor().to(step.dtype))


def code_range(alpha: Tensor, bits: Tensor | float, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lowest and highest code, counted from zero.

    (-n, n) when signed, (0, n) when unsigned, (-z, n - z) when shifted. A value is always code * step, and x = 0 has
    code 0.

    Paper: the quantizer of section 3.

    Args:
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        (low, high), whole numbers (for whole bits) held as floats, broadcastable to x.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> code_range(torch.tensor([1.0]), torch.tensor([3.0]), SIGNED)
        (tensor([-3.]), tensor([3.]))
    """
    n = levels(bits, grid)
    if grid.kind == "signed":
        return -n, n
    if grid.kind == "unsigned":
        return torch.zeros_like(n), n
    z = zero_point(alpha, bits, grid)
    return -z, n - z


def value_range(alpha: Tensor, bits: Tensor | float, grid: Grid) -> tuple[Tensor, Tensor]:
    """The two ends that values outside the range are truncated to.

    (-alpha, alpha) when signed, (0, alpha) when unsigned, (-z step, alpha - z step) when shifted. An element is in
    range when it lies strictly between them.

    Paper: the quantizer of section 3; z counts as a constant for the gradient.

    Args:
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        (lower, upper), units of x, broadcastable to x, differentiable in alpha (and in bits where z > 0).

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> value_range(torch.tensor([6.0]), torch.tensor([4.0]), Grid("shifted", 0.375))
        (tensor([-0.4000]), tensor([5.6000]))
    """
    if grid.kind == "signed":
        return -alpha, alpha
    if grid.kind == "unsigned":
        return torch.zeros_like(alpha), alpha
    below = zero_point(alpha, bits, grid) * step_size(alpha, bits, grid)
    return -below, alpha - below
