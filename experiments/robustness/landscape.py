"""The loss around a trained network, along one or two random directions.

Directions are filter-normalised (arXiv 1712.09913): d is normal, and each of its filters, the part of a weight that
makes one output channel, is scaled to the norm of the weight's own filter. Otherwise networks whose weights differ in
scale could not be compared. The weights that move are the float ones under the quantizers; the network then evaluates
as it always does, so of a quantized network it is the landscape of the quantized network. What is no weight of a
convolution or linear layer (biases, norms, boundaries) stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.robustness.perturbation import Point, Scores, Sweep, intact
from nipq.budget.hessian import layers, stored_weights
from nipq.nn.kinds import output_channel_axis


def filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random direction in the weights, each filter as long as the weight's.

    Args:
        model: prepared or not.
        seed: of the direction; models of one architecture get the same normal numbers.

    Returns:
        One tensor for each weight, by ``"<layer>.weight"``.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = layers(model)
    found = {}
    for name, weight in stored_weights(model).items():
        normal = torch.randn(weight.shape, generator=generator).to(weight)
        axis = output_channel_axis(owners[name.removesuffix("weight").removesuffix(".")])
        others = tuple(place for place in range(weight.ndim) if place != axis)
        length, drawn = (x.detach().square().sum(dim=others, keepdim=True).sqrt() for x in (weight, normal))
        found[name] = normal * (length / drawn.clamp(min=torch.finfo(drawn.dtype).tiny))
    return found


@torch.no_grad()
def landscape(
    model: nn.Module,
    batches: Iterable[Any],
    scores: Scores,
    *,
    dimensions: Literal[1, 2] = 1,
    radius: float = 0.5,
    points: int = 21,
    seed: int = 0,
) -> Sweep:
    """Score the network at w + x d_1, or at w + x d_1 + y d_2, on an even grid from -radius to radius.

    Args:
        model: prepared or float; afterwards it is what it was, to the bit.
        batches: what it is scored on, read many times.
        scores: of the model on batches.
        dimensions: 1 or 2.
        radius: largest step, in units of the weights' own length.
        points: along each direction; an odd number has the trained network in the middle.
        seed: of the first direction; the second has the next one.

    Returns:
        Points with ``x``, and ``y`` in two dimensions, which varies fastest.
    """
    weights = stored_weights(model)
    directions = [filter_normalised_direction(model, seed + place) for place in range(dimensions)]
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64).tolist()
    found = []
    with intact(model):
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        for place in product(steps, repeat=dimensions):
            for name, weight in weights.items():
                moved = start[name].clone()
                for step, direction in zip(place, directions, strict=True):
                    moved += step * direction[name]
                weight.copy_(moved)
            found.append(Point(dict(zip("xy", place, strict=False)), scores(model, batches)))
    return Sweep("landscape", tuple(found))
