"""Boxes: out of a detector's maps, and how well they are found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d


class Found(NamedTuple):
    """Detections in an image, surest first.

    Attributes:
        boxes: Left, upper, right and lower side in pixels, [N, 4].
        classes: [N] int64.
        scores: In [0, 1], [N].
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor


def decode(heat: Tensor, distances: Tensor, stride: int, most: int = 100) -> list[Found]:
    """Boxes of the highest peaks; a peak is nowhere lower than its eight neighbours.

    Args:
        heat: Logits of object centres, [N, C, H, W].
        distances: From each place to the sides of its box in input pixels, [N, 4, H, W].
        stride: Input pixels for one place.
        most: Boxes of an image.

    Returns:
        One result for each image.
    """
    width = heat.shape[-1]
    # At -inf, a neighbour that is no peak comes last; its score is 0.
    peaks = heat.masked_fill(max_pool2d(heat, 3, 1, 1) != heat, -torch.inf)
    logits, index = peaks.flatten(1).topk(min(most, peaks[0].numel()))
    places = peaks[0, 0].numel()
    found = []
    for image, (score, at) in enumerate(zip(logits.sigmoid(), index, strict=True)):
        x, y = at % places % width, at % places // width
        left, upper, right, lower = distances[image, :, y, x]
        boxes = torch.stack([x * stride - left, y * stride - upper, x * stride + right, y * stride + lower], 1)
        found.append(Found(boxes, at // places, score))
    return found


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of each pair of boxes.

    Args:
        first: [N, 4].
        second: [M, 4].

    Returns:
        In [0, 1], [N, M]; 0 for boxes without an area.
    """
    low, high = torch.maximum(first[:, None, :2], second[None, :, :2]), torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return (shared / (areas[0][:, None] + areas[1] - shared)).nan_to_num()


def hits(boxes: Tensor, truth: Tensor, least: float = 0.5) -> Tensor:
    """Mark the boxes that are right: each true box is given to the first that overlaps it enough.

    Args:
        boxes: Of one class in one image, surest first, [N, 4].
        truth: Of the same, [M, 4].
        least: Overlap that is enough.

    Returns:
        [N] bool.
    """
    shared = overlap(boxes, truth)
    right = torch.zeros(len(boxes), dtype=torch.bool)
    for number in range(len(boxes) if len(truth) else 0):
        best = int(shared[number].argmax())
        if shared[number, best] >= least:
            right[number] = True
            shared[:, best] = 0
    return right


def average_precision(scores: Tensor, right: Tensor, count: int) -> float:
    """Area under the precision over the recall, where the precision is the best at that recall or above.

    Args:
        scores: Of all boxes of a class in all images, [N].
        right: Which of them are right, [N] bool.
        count: Number of true boxes, at least one.

    Returns:
        In [0, 1].
    """
    ordered = right[scores.argsort(descending=True, stable=True)].double()
    precision = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    best = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    return float((best * ordered).sum()) / count  # recall rises by 1 / count at each right box


def mean_average_precision(found: list[Found], truth: list[tuple[Tensor, Tensor]], least: float = 0.5) -> float:
    """Mean over the classes that occur of :func:`average_precision`.

    Args:
        found: What was found in each image.
        truth: Its boxes [M, 4] and classes [M].
        least: Overlap with a true box that makes a box right.

    Returns:
        In [0, 1].
    """
    everything = torch.cat([classes for _, classes in truth])
    precisions = []
    for label in sorted(set(everything.tolist())):
        scores, right = [], []
        for each, (boxes, classes) in zip(found, truth, strict=True):
            mine = each.classes == label
            scores.append(each.scores[mine])
            right.append(hits(each.boxes[mine], boxes[classes == label], least))
        count = int((everything == label).sum())
        precisions.append(average_precision(torch.cat(scores), torch.cat(right), count))
    return sum(precisions) / len(precisions)
