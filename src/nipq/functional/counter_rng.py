"""Counter-based random numbers: a function of key and position, so that backward draws them again instead of saving.

A key is drawn from torch's own generator, once a call. So seeds, saved states and activation checkpointing govern the
noise as they govern dropout, processes with different seeds have different noise, and no number leaves the device. From
the key and the place of an element in memory follow its 16 random bits, by a hash that every backend repeats::

    h = pair * 0x9E3779B9 + low(key)                pair = place // 2; 32 bits throughout, overflow wraps
    h = h ^ (h >> 16);  h = h * 0x7FEB352D + high(key)
    h = h ^ (h >> 15);  h = h * 0x846CA68B;  h = h ^ (h >> 16)

The low half of h goes to the even place of the pair, the high half to the odd one. The mixer is lowbias32, with half of
the key in the middle: two sequences that meet before that part there. Keys are to be random, as one drawn here is, not
counted: two that differ in one high bit give noise that is alike.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

#: Constants of the hash.
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B

#: The pair from which :func:`unit_draw` comes; a tensor of fewer than 2^33 - 2 elements does not reach it.
LAST_PAIR = 0xFFFFFFFF


def seed_of(*parts: int | str) -> int:
    """Seed of a random generator from what it is for; it depends on every part and its place.

    Args:
        parts: such as ``(seed, "search", epoch, step)``.

    Returns:
        A number in [0, 2^63).

    Example:
        >>> seed_of(0, "search", 1) == seed_of(0, "search", 1), seed_of(0, "search", 1) == seed_of(0, "float", 1)
        (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_key(device: torch.device | str, generator: Generator | None = None) -> Tensor:
    """Draw a fresh key from torch's generator.

    Args:
        device: of the tensor that gets the noise; its generator is asked.
        generator: another source of randomness.

    Returns:
        62 random bits, int64, shape (1,), on the device.
    """
    return torch.randint(2**62, (1,), device=device, generator=generator)


def counter_bits(key: Tensor, count: int) -> Tensor:
    """Random bits of a key, for positions 0 to count - 1.

    Args:
        key: int64, shape (1,).
        count: how many.

    Returns:
        16 random bits each, int16 from -32768 to 32767, shape (count,).
    """
    pairs = torch.arange((count + 1) // 2, dtype=torch.int32, device=key.device)
    return _mixed(pairs, key).view(torch.int16)[:count]


def counter_noise(x: Tensor, key: Tensor) -> Tensor:
    """Uniform noise on (-1/2, 1/2), the same for the same key.

    noise = (k + 1/2) / 65536 with k a number of ``counter_bits``, by the order of memory: mean exactly 0, variance
    1/12 within 2e-11, never on an end.

    Paper: section 6.3.

    Args:
        x: gives shape, layout, type and device.
        key: see ``draw_key``.

    Returns:
        Noise, units of the step, in (-1/2, 1/2), shape and type of x, without gradient.

    Example:
        >>> key = torch.tensor([1])
        >>> bool((counter_noise(torch.zeros(9), key) == counter_noise(torch.zeros(9), key)).all())
        True
    """
    noise = torch.empty_like(x, requires_grad=False)
    in_memory_order(noise).copy_(counter_bits(key, noise.numel()))
    return noise.add_(0.5).mul_(2.0**-16)


def unit_draw(key: Tensor) -> Tensor:
    """Uniform number on [0, 1) for a whole tensor, independent of its noise.

    Args:
        key: see ``draw_key``.

    Returns:
        In [0, 1), a multiple of 2^-24, float32, shape (1,).
    """
    pair = torch.full((1,), LAST_PAIR - 2**32, dtype=torch.int32, device=key.device)
    return _shifted(_mixed(pair, key), 8).float() * 2.0**-24


def is_dense(x: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, in torch's usual layouts.

    Args:
        x: any tensor.
    """
    return (
        x.is_contiguous()
        or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def in_memory_order(x: Tensor) -> Tensor:
    """A view of a dense tensor with one axis, in the order of memory.

    Args:
        x: a tensor without gaps or overlaps, such as ``torch.empty_like`` returns.

    Returns:
        The view, shape (elements,).
    """
    return x.as_strided((x.numel(),), (1,))


def _mixed(pairs: Tensor, key: Tensor) -> Tensor:
    """The hash of the module's docstring, on int32 in place: multiplication wraps, as it does on unsigned numbers."""
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    h = pairs.mul_(_signed(GOLDEN)).add_(low)
    h = h.bitwise_xor_(_shifted(h, 16)).mul_(FIRST).add_(high)
    h = h.bitwise_xor_(_shifted(h, 15)).mul_(_signed(SECOND))
    return h.bitwise_xor_(_shifted(h, 16))


def _shifted(h: Tensor, places: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own repeats the sign."""
    return (h >> places).bitwise_and_((1 << (32 - places)) - 1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
