"""How much of a distribution lies in range, and how far the rest lies beyond.

The proxy's noise has mean 0 and is independent of x, so its expected error needs nothing else about x
(``nipq.theory``). The numbers come from a sample or, for the normal and Laplace distributions, from a formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.functional.grid import Grid, value_range
from nipq.functional.truncation import inside_range, truncate


class Tails(NamedTuple):
    """All that the proxy's expected error needs to know about the distribution of x at one alpha.

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
        alpha: boundary, units of x, > 0, one number.
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
    moving = missing.abs() if grid.kind == "signed" else missing.clamp(min=0)  # the end at zero does not move
    return Tails(inside.mean(), moving.mean(), (missing**2).mean())


def normal_tails(alpha: Tensor | float, grid: Grid) -> Tails:
    """Tails of N(0, 1) on a signed grid, of ReLU(N(0, 1)) on an unsigned one.

    Each side: inside Phi(alpha) - 1/2, excess phi(alpha) - alpha Phi(-alpha), squares
    (1 + alpha^2) Phi(-alpha) - alpha phi(alpha).

    Args:
        alpha: boundary, > 0, any shape.
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
        alpha: boundary, > 0, any shape.
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
    """The grid itself; refuses a shifted one, for which the paper makes no statement.

    Raises:
        ConfigError: if the grid is shifted.
    """
    if grid.kind == "shifted":
        raise ConfigError(
            "expected a signed or an unsigned grid, for which the paper's statements are made; found a shifted one. "
            "Use an unsigned grid on x + shift."
        )
    return grid


def _sides(grid: Grid) -> int:
    return 2 if unshifted(grid).kind == "signed" else 1
