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

GridKind = Literal["signed", "balanced", "full", "unsigned", "shifted"]

#: Fewest bits of a grid: a signed one with a single bit has no level but zero.
MIN_BITS = 2


@dataclass(frozen=True)
class Grid:
    """Levels of a quantizer: signed in three forms, unsigned, or shifted.

    ``signed``: -n..n times the step, symmetric, zero included, 2^b - 1 levels, for weights and signed activations.
    ``balanced``: odd multiples of half the step, symmetric, without zero, 2^b levels, for weights; its codes are the
    odd numbers -(2^b - 1)..2^b - 1.
    ``full``: -n..n - 1 times the step, zero included, 2^b levels, as LSQ publishes it, for weights.
    ``unsigned``: 0..n times the step, for what follows a ReLU.
    ``shifted``: n + 1 levels of which the one with code 0 is exactly zero, z of them below it, for activations with a
    short negative tail (h-swish reaches down to -3/8, SiLU to -0.2785, GELU to -0.17).

    Paper: the quantizer of section 3; the shift is Q3 in docs/internals/paper-map.md.

    Args:
        kind: ``"signed"``, ``"balanced"``, ``"full"``, ``"unsigned"`` or ``"shifted"``.
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

    @property
    def is_signed(self) -> bool:
        """True where the range reaches from -alpha to alpha, or a step less at the high end."""
        return self.kind in ("signed", "balanced", "full")

    @property
    def level_offset(self) -> float:
        """Distance of the levels from whole multiples of the step, in steps."""
        return 0.5 if self.kind == "balanced" else 0.0

    @property
    def codes_per_step(self) -> int:
        """Whole codes from one level to the next: 2 where levels lie at odd multiples of half a step."""
        return 2 if self.level_offset else 1


#: Signed grid, codes -n..n.
SIGNED = Grid("signed")
#: Unsigned grid, codes 0..n.
UNSIGNED = Grid("unsigned")
#: Grid of 2^b levels without zero.
BALANCED = Grid("balanced")
#: Signed grid of 2^b levels, one more below zero than above.
FULL = Grid("full")

#: Most bits of a balanced grid: its codes are odd numbers up to 2^b - 1 and have to fit a byte.
BALANCED_BITS = 7

#: Steps that n falls short of 2^(b-1) (signed grids) or 2^b (others).
_SHORT = {"signed": 1.0, "balanced": 0.5, "full": 0.0, "unsigned": 1.0, "shifted": 1.0}


def fitting_grid(grid: Grid, bits: int) -> Grid:
    """The grid itself, or the symmetric one in place of a balanced one of more than ``BALANCED_BITS`` bits.

    At 8 bits the two differ by half a step in 127.

    Args:
        grid: which levels.
        bits: whole bit-width.
    """
    return SIGNED if grid.kind == "balanced" and bits > BALANCED_BITS else grid


def power_of_bits(bits: Tensor | float, grid: Grid) -> Tensor:
    """2^(b-1) on signed, balanced and full grids, 2^b on the others.

    It is n up to a constant, so d n / d bits is ln2 times it.

    Paper: the quantizer of section 3.

    Args:
        bits: bit-width, whole or fractional, any shape.
        grid: which levels.

    Returns:
        The power, shape of bits, differentiable in bits.
    """
    bits = torch.as_tensor(bits)
    return torch.exp2(bits - 1 if grid.is_signed else bits)


def levels(bits: Tensor | float, grid: Grid) -> Tensor:
    """Number n of steps between zero and the far end of the range.

    n = 2^(b-1) - 1 when signed, 2^(b-1) - 1/2 when balanced, 2^(b-1) when full, 2^b - 1 when unsigned or shifted. alpha
    is n steps: from zero to the outermost level when signed or balanced, from zero to the lowest when full (the highest
    is a step nearer), from the low end to the high one otherwise. A signed grid has 2n + 1 = 2^b - 1 levels, the
    others 2^b.

    Paper: the quantizer of section 3; see docs/internals/paper-map.md.

    Args:
        bits: bit-width, >= 2, whole or fractional, any shape.
        grid: which levels.

    Returns:
        n, shape of bits, differentiable in bits; whole numbers, or halves when balanced, for whole bits.

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
    return power_of_bits(bits, grid) - _SHORT[grid.kind]


def step_size(alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """Distance between neighbouring levels.

    step = alpha / n(bits), by true division; its derivative in bits is -alpha ln2 2^(b-1) / n^2 on signed, balanced and
    full grids and -alpha ln2 2^b / n^2 otherwise.

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
    """Lowest and highest level, counted from zero in steps.

    (-n, n) when signed or balanced, (-n, n - 1) when full, (0, n) when unsigned, (-z, n - z) when shifted. A value is
    always level * step, and x = 0 has level 0, or 1/2 when balanced. The codes that are stored are whole: the level, or
    twice the level at half the step when balanced (``Grid.codes_per_step``).

    Paper: the quantizer of section 3.

    Args:
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        (low, high), whole numbers, or halves when balanced (for whole bits), held as floats, broadcastable to x.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> code_range(torch.tensor([1.0]), torch.tensor([3.0]), SIGNED)
        (tensor([-3.]), tensor([3.]))
    """
    n = levels(bits, grid)
    if grid.is_signed:
        return -n, n - 1 if grid.kind == "full" else n
    if grid.kind == "unsigned":
        return torch.zeros_like(n), n
    z = zero_point(alpha, bits, grid)
    return -z, n - z


def value_range(alpha: Tensor, bits: Tensor | float, grid: Grid) -> tuple[Tensor, Tensor]:
    """The two ends that values outside the range are truncated to.

    (-alpha, alpha) when signed or balanced, (-alpha, alpha - step) when full, (0, alpha) when unsigned,
    (-z step, alpha - z step) when shifted. An element is in range when it lies strictly between them.

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
    if grid.is_signed:
        return -alpha, alpha - step_size(alpha, bits, grid) if grid.kind == "full" else alpha
    if grid.kind == "unsigned":
        return torch.zeros_like(alpha), alpha
    below = zero_point(alpha, bits, grid) * step_size(alpha, bits, grid)
    return -below, alpha - below
