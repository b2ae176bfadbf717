"""Random seeds from what they are for, so that a resumed run draws what an uninterrupted one would have drawn.

Nothing saves or restores generator states: every step starts from a seed made of the run's seed, the stage, the epoch
and the step, whatever happened before it.
"""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part and its place.

    Args:
        parts: What the randomness is for, e.g. ``(seed, "search", epoch, step)``.

    Returns:
        The seed.

    Example:
        >>> seed_of(0, "search", 1) == seed_of(0, "search", 1)
        True
        >>> seed_of(0, "search", 1) == seed_of(0, "float", 1)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
