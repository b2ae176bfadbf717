"""Pseudo-quantization noise, in units of the step, from -1/2 to 1/2.

``uniform_noise`` is the practical choice of the paper's section 6.3; what its theory asks for is in
``nipq.functional.empirical``. Beyond the paper: ``gaussian_noise`` (DiffQ's), ``stochastic_noise`` (LOTION's) and
``tempered`` noise.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Generator, Tensor

from nipq.config import NoiseKind
from nipq.errors import ConfigError
from nipq.functional.counter_rng import counter_noise, draw_key
from nipq.functional.empirical import empirical_noise, error_table, table_noise
from nipq.functional.grid import Grid, code_range, step_size
from nipq.functional.uniform import integer_codes


def uniform_noise(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Noise drawn evenly from the step, independently for every element, by a fresh key.

    noise ~ U(-1/2, 1/2): mean 0, variance 1/12.

    Paper: section 6.3.

    Args:
        x: gives shape, type and device.
        generator: source of randomness; torch's own if left out.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.

    Example:
        >>> uniform_noise(torch.zeros(2, 3)).abs().max() <= 0.5
        tensor(True)
    """
    return counter_noise(x, draw_key(x.device, generator))


def gaussian_noise(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Normal noise with a deviation of half a step, DiffQ's default.

    noise ~ N(0, 1) / 2: mean 0, variance 1/4, three times that of uniform noise, and not bounded by half a step.

    Paper: DiffQ (arXiv 2104.09987), released code.

    Args:
        x: gives shape, type and device.
        generator: source of randomness; torch's own if left out.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.
    """
    return torch.empty_like(x, requires_grad=False).normal_(0, 0.5, generator=generator)


@torch.no_grad()
def stochastic_noise(
    x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid, *, generator: Generator | None = None
) -> Tensor:
    """Noise that lands on a level: up or down with the probabilities that keep the mean.

    With f = x / step - floor(x / step): 1 - f with probability f, else -f. Mean 0, variance f (1 - f), which is 1/6 on
    average where f is uniform; the only noise here that depends on the element's own place between two levels.

    Paper: randomised rounding, LOTION (arXiv 2510.08757); not in NIPQ's.

    Args:
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        generator: source of randomness; torch's own if left out.

    Returns:
        Noise, units of the step, in (-1, 1), shape and type of x, without gradient.
    """
    place = x / step_size(alpha, bits, grid)
    f = place - place.floor()
    up = torch.empty_like(f).uniform_(0, 1, generator=generator) < f
    return (up.to(f.dtype) - f).to(x.dtype)


@torch.no_grad()
def true_error(x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """The error that rounding makes, e = (Q(x) - x) / step, also where x is out of range.

    Args:
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        e, units of the step, shape of x, without gradient; in [-1/2, 1/2] in range.
    """
    step = step_size(alpha, bits, grid)
    return integer_codes(x, step, *code_range(alpha, bits, grid)) - x / step


def tempered(noise: Tensor, error: Tensor, share: Tensor | float) -> Tensor:
    """A mixture of noise and true error that leads from the proxy to the quantizer.

    (1 - share) noise + share error: the proxy at share 0, exactly the true quantizer's value and gradients at 1.

    Paper: noise tempering (arXiv 2212.05603) and soft-then-hard (arXiv 2104.05168); not in NIPQ's.

    Args:
        noise: units of the step.
        error: see ``true_error``, shape of noise.
        share: of the error, 0 to 1.

    Returns:
        The mixture, shape of noise.
    """
    return noise + share * (error - noise)


@torch.no_grad()
def draw_noise(kind: NoiseKind, x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid, key: Tensor) -> Tensor:
    """Noise of a kind by its name.

    Args:
        kind: ``"uniform"``, ``"empirical"`` (from a table of its errors), ``"histogram"`` (the published sampler of
            them), ``"gaussian"`` or ``"stochastic"``.
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        key: of uniform and empirical noise, see ``nipq.functional.counter_rng.draw_key``.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.

    Raises:
        ConfigError: if the kind is unknown.
    """
    match kind:
        case "uniform":
            return counter_noise(x, key)
        case "empirical":
            return table_noise(x, error_table(x, alpha, bits, grid), key)
        case "histogram":
            return empirical_noise(x, alpha, bits, grid, method="histogram")
        case "gaussian":
            return gaussian_noise(x)
        case "stochastic":
            return stochastic_noise(x, alpha, bits, grid)
        case _:
            raise ConfigError(
                f"expected a kind of noise out of {', '.join(get_args(NoiseKind))}; found {kind!r}. Choose one of them."
            )
