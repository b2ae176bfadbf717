"""Closed forms of what the paper proves about the noise proxy, for tests and documentation; training needs none.

Setting of the paper's section 5.2: the reconstruction loss R(alpha, bits) = E[(Qhat(x) - x)^2]. Noise has mean 0 and
is independent of x, so R and its gradients need nothing about x but three numbers for each alpha: how much of it lies
in range, and the first two moments of what lies beyond. ``Tails`` holds them, from a sample or, for the normal and
Laplace distributions, from a formula. Everything is float64. The shifted grid has no place in the paper and none here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.functional.grid import Grid, code_range, levels, power_of_bits, step_size, value_range
from nipq.functional.proxy import UNIFORM_VARIANCE
from nipq.functional.uniform import inside_range, integer_codes, truncate


class Tails(NamedTuple):
    """Share of a distribution in range at one alpha, and moments of what lies beyond.

    ``inside`` is P(in range); ``excess`` is E[(|x| - alpha)+] (x for |x| when unsigned), units of x; ``squares`` is
    E[(nearer end - x)^2; truncated], units of x squared.
    """

    inside: Tensor
    excess: Tensor
    squares: Tensor


def sample_tails(x: Tensor, alpha: Tensor | float, grid: Grid) -> Tails:
    """Tails of a sample.

    Args:
        x: the sample, any shape.
        alpha: clipping range, units of x, > 0, one number.
        grid: signed or unsigned.

    Returns:
        The three numbers, without dimensions.

    Raises:
        ConfigError: if the grid is shifted.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> sample_tails(torch.tensor([-3.0, 0.5, 1.0, 4.0]), 2.0, SIGNED).excess
        tensor(0.7500, dtype=torch.float64)
    """
    x, alpha = x.double(), float64(alpha)
    lower, upper = value_range(alpha, 2, unshifted(grid))
    inside = inside_range(x, lower, upper)
    missing = x - truncate(x, lower, upper)
    moving = missing.abs() if grid.is_signed else missing.clamp(min=0)  # the end at zero does not move
    return Tails(inside.mean(), moving.mean(), (missing**2).mean())


def normal_tails(alpha: Tensor | float, grid: Grid) -> Tails:
    """Tails of N(0, 1) on a signed grid, of ReLU(N(0, 1)) on an unsigned one.

    Each side: inside Phi(alpha) - 1/2, excess phi(alpha) - alpha Phi(-alpha), squares
    (1 + alpha^2) Phi(-alpha) - alpha phi(alpha).

    Args:
        alpha: clipping range, > 0, any shape.
        grid: signed or unsigned.

    Returns:
        The three numbers, shape of alpha.

    Raises:
        ConfigError: if the grid is shifted.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> normal_tails(1.0, SIGNED).inside
        tensor(0.6827, dtype=torch.float64)
    """
    alpha, sides = float64(alpha), _sides(grid)
    density = torch.exp(-(alpha**2) / 2) / math.sqrt(2 * math.pi)
    beyond = torch.special.ndtr(-alpha)
    squares = (1 + alpha**2) * beyond - alpha * density
    return Tails(sides * (0.5 - beyond), sides * (density - alpha * beyond), sides * squares)


def laplace_tails(alpha: Tensor | float, grid: Grid) -> Tails:
    """Tails of the Laplace distribution of scale 1 on a signed grid, of its ReLU on an unsigned one.

    Each side: inside (1 - e^-alpha)/2, excess e^-alpha / 2, squares e^-alpha.

    Args:
        alpha: clipping range, > 0, any shape.
        grid: signed or unsigned.

    Returns:
        The three numbers, shape of alpha.

    Raises:
        ConfigError: if the grid is shifted.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> laplace_tails(math.log(2), SIGNED).inside
        tensor(0.5000, dtype=torch.float64)
    """
    alpha, sides = float64(alpha), _sides(grid)
    half = torch.exp(-alpha) / 2
    return Tails(sides * (0.5 - half), sides * half, sides * 2 * half)


def float64(value: Tensor | float) -> Tensor:
    """A number or tensor as a float64 tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def unshifted(grid: Grid) -> Grid:
    """The grid itself; refuses one whose ends do not lie alike about zero, for which the paper makes no statement.

    Raises:
        ConfigError: if the grid is shifted or full.
    """
    if grid.kind in ("shifted", "full"):
        raise ConfigError(
            "expected a signed, balanced or unsigned grid, for which the paper's statements are made; found a "
            f"{grid.kind} one. Use an unsigned grid on x minus the low end."
        )
    return grid


def _sides(grid: Grid) -> int:
    return 2 if unshifted(grid).is_signed else 1


__all__ = [
    "UNIFORM_VARIANCE",
    "Gradient",
    "Tails",
    "error_power",
    "laplace_tails",
    "least_error_range",
    "normal_tails",
    "proxy_error",
    "proxy_gradient",
    "range_correction",
    "sample_tails",
    "step_slope",
    "stochastic_step_moment",
    "true_error",
]


class Gradient(NamedTuple):
    """Derivatives of an expected error: ``alpha`` in units of x, ``bits`` in units of x squared a bit."""

    alpha: Tensor
    bits: Tensor


def step_slope(alpha: Tensor | float, bits: Tensor | float, grid: Grid) -> Tensor:
    """Derivative of the step in the bit-width.

    -alpha ln2 2^(b-1) / n^2 when signed, -alpha ln2 2^b / n^2 when unsigned, which is -alpha ln2 (n + 1) / n^2.

    Paper: the release; see docs/internals/paper-map.md.

    Args:
        alpha: clipping range, units of x, > 0, any shape.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        The derivative, units of x a bit, negative.

    Example:
        >>> from nipq.functional.grid import UNSIGNED
        >>> step_slope(3.0, 2.0, UNSIGNED)
        tensor(-0.9242, dtype=torch.float64)
    """
    bits = float64(bits)
    return -float64(alpha) * math.log(2) * power_of_bits(bits, grid) / levels(bits, grid) ** 2


def proxy_error(
    tails: Tails,
    alpha: Tensor | float,
    bits: Tensor | float,
    grid: Grid,
    noise_variance: Tensor | float = UNIFORM_VARIANCE,
) -> Tensor:
    """Expected squared error of the proxy.

    R = var step^2 P(in) + E[(nearer end - x)^2; truncated].

    Paper: section 5.2; T9 in docs/internals/paper-map.md.

    Args:
        tails: of x at this alpha.
        alpha: clipping range, units of x, > 0, any shape.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: signed or unsigned.
        noise_variance: E[noise^2], units of the step squared; that of uniform noise if left out.

    Returns:
        R, units of x squared.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> proxy_error(normal_tails(2.5, SIGNED), 2.5, 4, SIGNED)
        tensor(0.0129, dtype=torch.float64)
    """
    step = step_size(float64(alpha), float64(bits), grid)
    return noise_variance * step**2 * tails.inside + tails.squares


def proxy_gradient(
    tails: Tails,
    alpha: Tensor | float,
    bits: Tensor | float,
    grid: Grid,
    noise_variance: Tensor | float = UNIFORM_VARIANCE,
) -> Gradient:
    """Expected gradients of the proxy's squared error.

    d/d alpha = 2 var step / n P(in) - 2 excess, whose root is the least-error clipping range (T6; OCTAV's equation with
    n for 2^(b-1)); d/d bits = 2 var step (d step / d bits) P(in), which is never positive: reconstruction alone pushes
    bits up, only a cost pushes them down (T8).

    Paper: section 5.2; T3, T6 and T8 in docs/internals/paper-map.md.

    Args:
        tails: of x at this alpha.
        alpha: clipping range, units of x, > 0, any shape.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: signed or unsigned.
        noise_variance: E[noise^2], units of the step squared; that of uniform noise if left out.

    Returns:
        The two derivatives.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> proxy_gradient(normal_tails(2.5, SIGNED), 2.5, 4, SIGNED).alpha
        tensor(0.0004, dtype=torch.float64)
    """
    alpha, bits = float64(alpha), float64(bits)
    pull = 2 * noise_variance * step_size(alpha, bits, grid) * tails.inside
    return Gradient(pull / levels(bits, grid) - 2 * tails.excess, pull * step_slope(alpha, bits, grid))


def error_power(x: Tensor, alpha: Tensor | float, bits: Tensor | float, grid: Grid) -> Tensor:
    """Mean square of the true in-range error, units of the step squared; 0 with nothing in range.

    E[e^2 | in range], e = (Q(x) - x) / step: 1/12 for errors spread evenly. Given to ``proxy_error`` as the noise
    variance it yields the true error, and to ``proxy_gradient`` LSQ's gradients: that is T3.

    Paper: section 5.2; T3 in docs/internals/paper-map.md.

    Args:
        x: the sample, any shape.
        alpha: clipping range, units of x, > 0, one number.
        bits: bit-width, >= 2, one number.
        grid: signed or unsigned.

    Returns:
        The mean square, without dimensions.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> error_power(torch.tensor([0.25, 0.25, 9.0]), 3.0, 3, SIGNED)
        tensor(0.0625, dtype=torch.float64)
    """
    inside, error, _, _ = _errors(x, alpha, bits, grid)
    return (inside * error**2).sum() / inside.sum().clamp(min=1)


def true_error(x: Tensor, alpha: Tensor | float, bits: Tensor | float, grid: Grid) -> Tensor:
    """Mean squared error of the quantizer on a sample.

    E[(Q(x) - x)^2].

    Args:
        x: the sample, any shape.
        alpha: clipping range, units of x, > 0, one number.
        bits: bit-width, >= 2, one number.
        grid: signed or unsigned.

    Returns:
        The error, units of x squared, without dimensions.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> true_error(torch.tensor([0.25, 0.25, 3.5]), 3.0, 3, SIGNED)
        tensor(0.1250, dtype=torch.float64)
    """
    _, error, step, _ = _errors(x, alpha, bits, grid)
    return ((error * step) ** 2).mean()


def range_correction(x: Tensor, alpha: Tensor | float, bits: Tensor | float, grid: Grid) -> Tensor:
    """Term that LSQ's gradient lacks to be the derivative of the true error in alpha.

    2 E[(Q(x) - x) x; in range] / alpha. A level moves with alpha as Q / alpha, where straight-through gradients have
    (Q - x) / alpha; where the nearest level changes the two errors are equal, so the jump contributes nothing.

    Paper: not in it; T4b in docs/internals/paper-map.md.

    Args:
        x: the sample, any shape.
        alpha: clipping range, units of x, > 0, one number.
        bits: bit-width, >= 2, one number.
        grid: signed or unsigned.

    Returns:
        The missing term, units of x, without dimensions.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> range_correction(torch.tensor([1.25, 9.0]), 3.0, 3, SIGNED)
        tensor(-0.1042, dtype=torch.float64)
    """
    inside, error, step, wide = _errors(x, alpha, bits, grid)
    return 2 * (inside * error * step * wide).mean() / float64(alpha)


def least_error_range(
    tails_at: Callable[[Tensor, Grid], Tails],
    bits: Tensor | float,
    grid: Grid,
    noise_variance: Tensor | float = UNIFORM_VARIANCE,
) -> Tensor:
    """Clipping range at which the proxy's expected error is least, for a distribution known by formula.

    The root of ``proxy_gradient`` in alpha, by bisection: the derivative rises with alpha.

    Paper: section 5.2; T5 and T6 in docs/internals/paper-map.md.

    Args:
        tails_at: tails as a function of alpha and grid, such as ``normal_tails``.
        bits: bit-width, >= 2, any shape.
        grid: signed or unsigned.
        noise_variance: E[noise^2], units of the step squared; that of uniform noise if left out.

    Returns:
        alpha, shape of bits, between 0 and 64.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> least_error_range(normal_tails, 4, SIGNED)
        tensor(2.4868, dtype=torch.float64)
    """
    bits = float64(bits)
    low, high = torch.zeros_like(bits), torch.full_like(bits, 64)
    for _ in range(60):  # 64 / 2^60 is below what float64 can tell apart
        middle = (low + high) / 2
        rising = proxy_gradient(tails_at(middle, grid), middle, bits, grid, noise_variance).alpha > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return (low + high) / 2


def stochastic_step_moment(
    alpha: Tensor | float, bits: Tensor | float, grid: Grid, *, power: int, choices: tuple[int, ...]
) -> Tensor:
    """Mean of a power of the step when the bits are rounded stochastically.

    (1 - share) step(lower)^power + share step(upper)^power between the neighbouring choices. The step is convex in
    bits, so this exceeds step(bits)^power: noise at fractional bits is stronger than that of a continuous bit-width.

    Paper: Eq. 15; see docs/internals/paper-map.md.

    Args:
        alpha: clipping range, units of x, > 0, any shape.
        bits: bit-width, from the first to the last choice, one number.
        grid: which levels.
        power: 1 for the step, 2 for the noise power.
        choices: allowed whole bit-widths, ascending.

    Returns:
        The mean, units of x to the power.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> stochastic_step_moment(3.0, 2.5, SIGNED, power=1, choices=(2, 3, 4))
        tensor(2., dtype=torch.float64)
    """
    value = float(bits)
    lower = max((choice for choice in choices if choice <= value), default=choices[0])
    upper = min((choice for choice in choices if choice > value), default=lower)
    share = (value - lower) / (upper - lower) if upper > lower else 0.0
    alpha = float64(alpha)
    return (1 - share) * step_size(alpha, lower, grid) ** power + share * step_size(alpha, upper, grid) ** power


def _errors(
    x: Tensor, alpha: Tensor | float, bits: Tensor | float, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In-range mask, error in steps, step, and x, all float64."""
    x, alpha, bits = x.double(), float64(alpha), float64(bits)
    step = step_size(alpha, bits, unshifted(grid))
    error = integer_codes(x, step, *code_range(alpha, bits, grid), level_offset=grid.level_offset) - x / step
    return inside_range(x, *value_range(alpha, bits, grid)), error, step, x
