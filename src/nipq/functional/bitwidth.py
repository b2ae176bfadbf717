"""Bit-widths: continuous ones from their parameter, and whole ones by straight-through rounding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nipq.errors import ConfigError

#: Least distance of a start from an end of the range, as a share of the range: the parameter is infinite there.
_END_MARGIN = 1e-3


def bits_from_raw(raw: Tensor, low: float, high: float) -> Tensor:
    """Bit-width from its parameter.

    bits = low + (high - low) * sigmoid(raw); d bits / d raw = (bits - low) (high - bits) / (high - low), which
    vanishes at both ends.

    Paper: bit-width relaxation, section 4; see docs/internals/paper-map.md (there low = 2, high = 14).

    Args:
        raw: the parameter, any real number, any shape.
        low: fewest bits.
        high: most bits, above low.

    Returns:
        Bits, strictly between low and high, shape of raw.

    Example:
        >>> bits_from_raw(torch.zeros(1), 2, 14)
        tensor([8.])
    """
    return low + (high - low) * torch.sigmoid(raw)


def raw_from_bits(bits: Tensor | float, low: float, high: float) -> Tensor:
    """Parameter of a bit-width, the inverse of ``bits_from_raw``.

    raw = logit((bits - low) / (high - low)). At the very ends the parameter would be infinite and its gradient zero,
    so bits nearer to an end than a thousandth of the range count as that near.

    Paper: the release; see docs/internals/paper-map.md.

    Args:
        bits: bit-width, from low to high, any shape.
        low: fewest bits.
        high: most bits, above low.

    Returns:
        The parameter, shape of bits.

    Raises:
        ConfigError: if the range is empty, or bits lie outside it.

    Example:
        >>> raw_from_bits(torch.tensor([8.0]), 2, 14)
        tensor([0.])
    """
    bits = torch.as_tensor(bits)
    if not low < high:
        raise ConfigError(
            f"expected a bit range with its low end below its high end; found {low:g} to {high:g}. "
            "Widen the range, or fix the bits instead of learning them."
        )
    if not bool(((bits >= low) & (bits <= high)).all()):
        raise ConfigError(
            f"expected bits from {low:g} to {high:g}; found {float(bits.min()):g} to {float(bits.max()):g}. "
            "Start inside the range, or widen it."
        )
    share = (bits - low) / (high - low)
    return torch.logit(share.clamp(_END_MARGIN, 1 - _END_MARGIN))


def round_bits(bits: Tensor, choices: tuple[int, ...]) -> Tensor:
    """Nearest allowed bit-width, with identity gradient.

    The nearest of the choices; the lower of two that are equally near, as it costs less.

    Paper: the release; see docs/internals/paper-map.md.

    Args:
        bits: bit-width, any shape.
        choices: allowed whole bit-widths, ascending, at least one.

    Returns:
        Whole numbers held as floats, shape of bits; d/d bits is 1.

    Example:
        >>> round_bits(torch.tensor([3.3, 5.9, 6.1]), (2, 4, 8))
        tensor([4., 4., 8.])
    """
    lower, upper = _neighbours(bits.detach(), choices)
    nearest = torch.where(bits - lower <= upper - bits, lower, upper)
    return _with_identity_gradient(nearest, bits)


def stochastic_round_bits(bits: Tensor, choices: tuple[int, ...], draw: Tensor | None = None) -> Tensor:
    """One of the two neighbouring allowed bit-widths, at random, with identity gradient.

    The upper neighbour with probability (bits - lower) / (upper - lower), so that the mean is bits. One draw for each
    element of bits, that is one a tensor and forward, not one for each element of the tensor.

    Paper: Eq. 15; T11 in docs/internals/paper-map.md.

    Args:
        bits: bit-width, any shape.
        choices: allowed whole bit-widths, ascending, at least one.
        draw: random numbers in [0, 1), shape of bits, such as ``nipq.functional.counter_rng.unit_draw`` gives; from
            torch's own generator if left out.

    Returns:
        Whole numbers held as floats, shape of bits; d/d bits is 1.

    Example:
        >>> stochastic_round_bits(torch.tensor([4.0]), (2, 4, 8))
        tensor([4.])
    """
    lower, upper = _neighbours(bits.detach(), choices)
    chance = (bits.detach() - lower) / (upper - lower)
    draw = torch.rand_like(chance) if draw is None else draw
    return _with_identity_gradient(torch.where(draw < chance, upper, lower), bits)


def _neighbours(bits: Tensor, choices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The choices below and above; beyond the ends the two at that end. Numbers, no table: nothing to copy over."""
    first, last = choices[0], choices[-1]
    if len(choices) == 1:  # whichever side is drawn, it is the same
        return torch.full_like(bits, first), torch.full_like(bits, first)
    if last - first == len(choices) - 1:
        lower = bits.floor().clamp(first, last - 1)
        return lower, lower + 1
    lower, upper = torch.full_like(bits, first), torch.full_like(bits, choices[1])
    for below, above in pairwise(choices[1:]):
        lower = torch.where(bits >= below, below, lower)
        upper = torch.where(bits >= below, above, upper)
    return lower, upper


def _with_identity_gradient(value: Tensor, bits: Tensor) -> Tensor:
    """``value`` exactly (bits - bits is exactly 0), with derivative 1 in bits."""
    return value.detach() + (bits - bits.detach())
