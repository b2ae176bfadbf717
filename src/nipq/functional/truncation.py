"""Truncation to the range, and the gradient that rounding and the noise proxy have in common.

Both are in the training path, so the masks are numbers 0 and 1 and are multiplied. ``torch.where`` and boolean masks
say the same, but on a CPU they cost ten times as much: one mispredicted branch an element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of the arguments of a truncation; None where none was asked for."""

    x: Tensor | None
    step: Tensor | None
    lower: Tensor | None
    upper: Tensor | None


def truncate(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Values of x, or the nearer end of the range.

    min(max(x, lower), upper).

    Paper: the quantizer of section 3.

    Args:
        x: any shape.
        lower: low end, units of x, broadcastable to x.
        upper: high end, units of x, broadcastable to x.

    Returns:
        Truncated values, shape of x.

    Example:
        >>> truncate(torch.tensor([-1.0, 1.0, 9.0]), torch.tensor([0.0]), torch.tensor([6.0]))
        tensor([0., 1., 6.])
    """
    return torch.clamp_min(x, lower).clamp_max_(upper)


def inside_range(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """1 strictly inside the range, 0 elsewhere.

    An element on either end is not inside: a ReLU's zeros get no noise and pass no gradient.

    Paper: the release; see docs/paper_map.md.

    Args:
        x: any shape.
        lower: low end, units of x, broadcastable to x.
        upper: high end, units of x, broadcastable to x.

    Returns:
        Zeros and ones, shape and type of x, without gradient; a new tensor, free to be written to.

    Example:
        >>> inside_range(torch.tensor([0.0, 1.0, 6.0]), torch.tensor([0.0]), torch.tensor([6.0]))
        tensor([0., 1., 0.])
    """
    x = x.detach()
    return x.clone().lt_(upper).mul_(x.clone().gt_(lower))


def truncation_gradients(
    grad: Tensor, x: Tensor, slope: Tensor, ends: tuple[Tensor, Tensor], step: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of x + slope * step inside the range, and of its ends outside.

    With slope = (Q(x) - x) / step this is LSQ, with slope = noise it is the proxy; that this is the only difference
    is the content of the paper's section 5.2. An element on an end counts as truncated.

    Paper: section 5.2; see docs/paper_map.md.

    Args:
        grad: incoming gradient, shape of x.
        x: what was truncated.
        slope: derivative of the result in the step, shape of x.
        ends: (lower, upper), broadcastable to x.
        step: distance between levels, broadcastable to x.
        needs: whether the gradient of x, step, lower, upper is wanted.

    Returns:
        The four gradients, each of the shape and type of its argument.
    """
    lower, upper = ends
    inside = inside_range(x, lower, upper).mul_(grad)
    return Gradients(
        x=inside if needs[0] else None,
        step=(inside * slope).sum_to_size(step.shape).to(step.dtype) if needs[1] else None,
        lower=_total(x.detach().clone().le_(lower), grad, lower) if needs[2] else None,
        upper=_total(x.detach().clone().ge_(upper), grad, upper) if needs[3] else None,
    )


def _total(mask: Tensor, grad: Tensor, end: Tensor) -> Tensor:
    return mask.mul_(grad).sum_to_size(end.shape).to(end.dtype)
