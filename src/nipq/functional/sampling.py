"""Which elements of a large tensor stand for all of them."""

from __future__ import annotations

import math


def even_stride(count: int, most: int) -> int:
    """Distance between elements of a flat tensor of which about ``most`` are kept, in all columns alike.

    The least stride of at least count / most that has no divisor in common with count. Every length of an axis divides
    count, so the kept elements walk through all places of every axis; a stride of 189 in rows of 27 would see the first
    column of each row and nothing else.

    Args:
        count: elements of the tensor.
        most: how many to keep, at least 1; as many or fewer are kept.

    Returns:
        1 or more.

    Example:
        >>> even_stride(8 * 27 * 27, 32), even_stride(100, 200)  # 183 would be a multiple of 3
        (185, 1)
    """
    stride = max(1, -(-count // most))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
