"""Pseudo-quantization noise, in units of the step, from -1/2 to 1/2.

``uniform_noise`` is the practical choice of the paper's section 6.3. ``empirical_noise``, drawn from the errors that
rounding the very tensor would make, is what the theory of its section 5.2 asks for: where uniform noise is far from the
truth (two bits, zero-heavy tensors, weights that have settled on the grid) it keeps the gradient of the clipping range
right (T3 in ``docs/internals/paper-map.md``). Beyond the paper: ``gaussian_noise`` (DiffQ's), ``stochastic_noise``
(LOTION's) and noise with a share of the true error (``mixed_noise``).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from nipq.config import NoiseKind
from nipq.errors import ConfigError
from nipq.functional.counter_rng import counter_bits, counter_noise, draw_key, in_memory_order, is_dense
from nipq.functional.grid import Grid, code_range, step_size, value_range
from nipq.functional.uniform import inside_range, integer_codes, widened

EmpiricalMethod = Literal["table", "histogram"]

#: Bins of the published sampler.
HISTOGRAM_BINS = 256

#: Entries that 16 random bits address.
TABLE_PLACES = 65536

#: Errors that empirical noise is drawn from: 16 KiB, which stay in the first cache.
ERROR_TABLE = 4096


class ErrorTable(NamedTuple):
    """Rounding errors of a tensor to draw noise from.

    Attributes:
        errors: in units of the step, the in-range ones first, shape (ERROR_TABLE,) or one for each element.
        inside: how many are of in-range elements, int64, shape (1,).
    """

    errors: Tensor
    inside: Tensor


@torch.no_grad()
def error_table(
    x: Tensor,
    alpha: Tensor,
    bits: Tensor | float,
    grid: Grid,
    generator: Generator | None = None,
    *,
    cap: float = math.inf,
) -> ErrorTable:
    """Rounding errors of 4,096 elements picked at random, or of all where there are no more.

    By the inequality of Dvoretzky, Kiefer and Wolfowitz the distribution of m picked errors is nowhere farther than d
    from that of all of them, but for a chance of 2 exp(-2 m d^2): 0.03 in all but one of 800 tables of 4,096.

    Paper: section 6.3, which counts all errors in a histogram.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        generator: source of randomness; torch's own if left out.
        cap: what x is cut to before: the upper end of a ReLU6 that was left out.

    Returns:
        The errors of the in-range ones among the picked elements, and how many they are.

    Raises:
        ConfigError: if any bit-width is below 2.
    """
    x = x if is_dense(x) else x.contiguous()
    size, flat = x.numel(), in_memory_order(x.detach())
    if size > ERROR_TABLE:
        place = torch.randint(size, (ERROR_TABLE,), device=x.device, generator=generator)
    else:
        place = torch.arange(size, device=x.device)
    if alpha.numel() > 1:
        axis = next(axis for axis, length in enumerate(alpha.shape) if length > 1)
        alpha = alpha.flatten()[place // x.stride(axis) % alpha.numel()]
    picked = widened(flat[place]).clamp(max=cap)
    error = true_error(picked, alpha, bits, grid).float()
    inside = inside_range(picked, *value_range(alpha, bits, grid)) > 0
    # Stable, at a fixed shape: in-range errors move to the front, the others onto one spare place behind them all.
    target = torch.where(inside, torch.cumsum(inside, 0) - 1, len(place))
    table = error.new_zeros(len(place) + 1).scatter_(0, target, error)
    return ErrorTable(table[:-1], inside.sum().reshape(1))


@torch.no_grad()
def table_noise(x: Tensor, table: ErrorTable, key: Tensor) -> Tensor:
    """Noise drawn from a table of errors, with replacement; uniform noise from an empty table.

    noise = errors[k inside / 65536], rounded down, with k of ``counter_bits`` from 0 to 65535.

    Args:
        x: gives shape, layout, type and device.
        table: see ``error_table``.
        key: see ``nipq.functional.counter_rng.draw_key``.

    Returns:
        Noise, units of the step, shape and type of x, without gradient.
    """
    noise = torch.empty_like(x, requires_grad=False)
    wide = counter_bits(key, noise.numel()).to(torch.int32).bitwise_and_(0xFFFF)
    in_memory_order(noise).copy_(table.errors[(wide * table.inside) >> 16])
    return torch.where(table.inside > 0, noise, counter_noise(x, key))


@torch.no_grad()
def empirical_noise(
    x: Tensor,
    alpha: Tensor,
    bits: Tensor | float,
    grid: Grid,
    *,
    method: EmpiricalMethod = "table",
    generator: Generator | None = None,
) -> Tensor:
    """Noise drawn from the rounding errors of the tensor's own in-range elements.

    Every element gets e = (Q(y) - y) / step of an in-range element y picked at random, with replacement and without
    regard to its own value. ``"table"`` picks y from at most 4,096 of them, see ``error_table``; ``"histogram"`` is the
    published sampler: all errors are counted in 256 bins on [-1/2, 1/2], a bin is drawn by its count, then a point
    inside it. Where no element is in range there is nothing to draw from, and the noise is uniform.

    Paper: section 6.3; T3 in docs/internals/paper-map.md.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        method: ``"table"`` or ``"histogram"``.
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
    if method == "table":
        return table_noise(x, error_table(x, alpha, bits, grid, generator), draw_key(x.device, generator))
    step = step_size(alpha, bits, grid)
    lower, upper = value_range(alpha, bits, grid)
    low, high = code_range(alpha, bits, grid)
    error = (integer_codes(x, step, low, high, level_offset=grid.level_offset) - x / step).to(x.dtype).flatten()
    inside = inside_range(x, lower, upper).flatten() > 0
    return _from_histogram(error, inside, generator).reshape(x.shape)


def _from_histogram(error: Tensor, inside: Tensor, generator: Generator | None) -> Tensor:
    """The published sampler: a bin by its count, then a uniform point in the bin.

    A bin is looked up in a table of 65,536 entries that holds every bin in proportion to its count, to 1/65,536 of all,
    which spares a search among the running counts for every element.
    """
    # histc leaves out what lies outside the interval, as the release does; 2 is outside. It has no half precision.
    kept = torch.where(inside, error, 2.0)
    kept = kept if kept.dtype == torch.float64 else kept.float()
    counts = torch.histc(kept, HISTOGRAM_BINS, -0.5, 0.5).double()
    counts = torch.where(counts.sum() > 0, counts, 1.0)
    edges = torch.cumsum(counts, 0)
    places = (torch.arange(TABLE_PLACES, dtype=torch.float64, device=kept.device) + 0.5) / TABLE_PLACES * edges[-1]
    left = torch.searchsorted(edges, places, right=True).to(kept.dtype)  # the bin whose running count first exceeds it
    chosen = left[counter_bits(draw_key(kept.device, generator), kept.numel()).to(torch.int32).bitwise_and_(0xFFFF)]
    noise = (chosen + 0.5 + counter_noise(kept, draw_key(kept.device, generator))) / HISTOGRAM_BINS - 0.5
    return noise.to(error.dtype)


def uniform_noise(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Noise drawn uniformly from the step, independently for every element, by a fresh key.

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
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.
        generator: source of randomness; torch's own if left out.

    Returns:
        Noise, units of the step, in (-1, 1), shape and type of x, without gradient.
    """
    place = x / step_size(alpha, bits, grid) - grid.level_offset
    f = place - place.floor()
    up = torch.empty_like(f).uniform_(0, 1, generator=generator) < f
    return (up.to(f.dtype) - f).to(x.dtype)


@torch.no_grad()
def true_error(x: Tensor, alpha: Tensor, bits: Tensor | float, grid: Grid) -> Tensor:
    """The error that rounding makes, e = (Q(x) - x) / step, also where x is out of range.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, broadcastable to alpha.
        grid: which levels.

    Returns:
        e, units of the step, shape of x, without gradient; in [-1/2, 1/2] in range.
    """
    step = step_size(alpha, bits, grid)
    return integer_codes(x, step, *code_range(alpha, bits, grid), level_offset=grid.level_offset) - x / step


def mixed_noise(noise: Tensor, error: Tensor, share: Tensor | float) -> Tensor:
    """A mixture of noise and true error that leads from the proxy to the quantizer.

    (1 - share) noise + share error: the proxy at share 0, exactly the true quantizer's value and gradients at 1.

    Paper: "noise tempering" (arXiv 2212.05603) and soft-then-hard (arXiv 2104.05168); not in NIPQ's.

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
        alpha: clipping range, units of x, > 0, broadcastable to x.
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
