"""The library without its compiled kernels, in a process that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nipq.kernels.cpu

#: As Any: what it imports is replaced here.
_CPU: Any = nipq.kernels.cpu


@contextmanager
def plain_operations() -> Iterator[None]:
    """Every quantizer inside goes through plain torch operations, as with ``NIPQ_KERNELS=0``.

    That switch is read once in a process, so it cannot serve two ways side by side; what it answers is replaced, by
    hand, as ``unittest.mock`` would add to what is timed.
    """
    before = _CPU.available
    _CPU.available = _not_available
    try:
        yield
    finally:
        _CPU.available = before


def _not_available() -> bool:
    return False
