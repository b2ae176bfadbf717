"""Pseudo-quantization noise, in units of the step, from -1/2 to 1/2.

``uniform_noise`` is the practical choice of the paper's section 6.3; ``empirical_noise`` draws from the errors that
rounding this very tensor would make, which is what the theory of section 5.2 asks for. Beyond the paper:
``gaussian_noise`` (DiffQ's), ``stochastic_noise`` (LOTION's) and ``tempered`` noise.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from nipq.config import NoiseKind
from nipq.errors import ConfigError
from nipq.functional.grid import Grid, code_range, step_size, value_range
from nipq.functional.truncation import inside_range
from nipq.functional.uniform import integer_codes

EmpiricalMethod = Literal["resample", "histogram"]

HISTOGRAM_BINS = 256  # of the published sampler


def uniform_noise(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Noise drawn evenly from the step, independently for every element.

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
    noise = torch.empty_like(x, requires_grad=False)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return noise.uniform_(-0.5, 0.5, generator=generator)
    # A CPU's generator is slow and draws one number at a time: cut each 64-bit draw into four. 16 bits divide the
    # step into 65,536, mean exactly 0. The copy goes by memory order, which keeps the layout of x.
    draws = torch.empty((noise.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    noise.as_strided((noise.numel(),), (1,)).copy_(draws.view(torch.int16)[: noise.numel()])
    return noise.add_(0.5).mul_(2.0**-16)


@torch.no_grad()
def empirical_noise(
    x: Tensor,
    alpha: Tensor,
    bits: Tensor | float,
    grid: Grid,
    *,
    method: EmpiricalMethod = "resample",
    generator: Generator | None = None,
) -> Tensor:
    """Noise drawn from the rounding errors of the tensor's own in-range elements.

    Every element gets e = (Q(y) - y) / step of an in-range element y picked at random, with replacement and without
    regard to its own value. ``"resample"`` takes e as it is; ``"histogram"`` is the published sampler: the errors are
    counted in 256 bins on [-1/2, 1/2], a bin is drawn by its count, then a point inside it. Where no element is in
    range there is nothing to draw from, and the noise is uniform.

    Paper: section 6.3; T3 in docs/paper_map.md.

    Args:
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        method: ``"resample"`` or ``"histogram"``.
        generator: source of randomness; torch's own if left out.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.

    Raises:
        ConfigError: if the method is unknown, or any bit-width is below 2.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> x = torch.tensor([0.25, 0.25, 9.0])  # on a grid of step 1: two errors of -0.25, one element truncated
        >>> empirical_noise(x, torch.tensor([3.0]), torch.tensor([3.0]), SIGNED)
        tensor([-0.2500, -0.2500, -0.2500])
    """
    if method not in get_args(EmpiricalMethod):
        raise ConfigError(
            f"expected an empirical noise method out of {', '.join(get_args(EmpiricalMethod))}; found {method!r}. "
            "Choose one of them."
        )
    step = step_size(alpha, bits, grid)
    lower, upper = value_range(alpha, bits, grid)
    low, high = code_range(alpha, bits, grid)
    error = (integer_codes(x, step, low, high) - x / step).to(x.dtype).flatten()
    inside = inside_range(x, lower, upper).flatten() > 0
    draw = _resampled if method == "resample" else _from_histogram
    return draw(error, inside, generator).reshape(x.shape)


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
def draw_noise(kind: NoiseKind, x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """Noise of a kind by its name.

    Args:
        kind: ``"uniform"``, ``"empirical"`` (errors resampled), ``"histogram"`` (the published sampler of them),
            ``"gaussian"`` or ``"stochastic"``.
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.

    Raises:
        ConfigError: if the kind is unknown.
    """
    match kind:
        case "uniform":
            return uniform_noise(x)
        case "empirical":
            return empirical_noise(x, alpha, bits, grid)
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


def _random_index(count: Tensor, size: int, generator: Generator | None) -> Tensor:
    """``size`` whole numbers, each one of 0..count-1 at random; ``count`` stays on its device."""
    # 2^53 so that the remainder favours no index by more than count / 2^53. Drawn as integers because a float32
    # number cannot address more than 2^24 elements.
    wide = torch.randint(2**53, (size,), generator=generator, device=count.device)
    return torch.remainder(wide, count)


def _resampled(error: Tensor, inside: Tensor, generator: Generator | None) -> Tensor:
    """One in-range error per element, with replacement, at fixed shapes.

    The in-range errors are moved to the front of a table, the others all onto one spare place at its end. The table
    starts out as uniform noise, so that with nothing in range the whole of it is the fallback.
    """
    size = error.numel()
    table = uniform_noise(error.new_empty(size + 1), generator)
    place = torch.where(inside, torch.cumsum(inside, 0) - 1, size)
    table = table.scatter(0, place, error)
    count = inside.sum()
    return table[_random_index(torch.where(count > 0, count, size).clamp(min=1), size, generator)]


def _from_histogram(error: Tensor, inside: Tensor, generator: Generator | None) -> Tensor:
    """The published sampler: a bin by its count, then a uniform point in the bin."""
    # histc leaves out what lies outside the interval, as the release does; 2 is outside. It has no half precision.
    kept = torch.where(inside, error, 2.0)
    kept = kept if kept.dtype == torch.float64 else kept.float()
    counts = torch.histc(kept, HISTOGRAM_BINS, -0.5, 0.5).long()
    counts = torch.where(counts.sum() > 0, counts, 1)
    edges = torch.cumsum(counts, 0)
    # The n-th in-range error in order of bins lies in the first bin whose running count exceeds n: a draw in
    # proportion to the counts, 8 comparisons an element.
    chosen = torch.searchsorted(edges, _random_index(edges[-1], error.numel(), generator), right=True)
    noise = (chosen + 0.5 + uniform_noise(kept, generator)) / HISTOGRAM_BINS - 0.5
    return noise.to(error.dtype)
