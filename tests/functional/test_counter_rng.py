"""Numbers from a counter: alike for one key, unlike for two, and as random as training needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nipq.functional.counter_rng import counter_bits, counter_noise, draw_key, in_memory_order, is_dense, unit_draw

KEYS = st.integers(0, 2**62 - 1)


def reference(place: int, key: int) -> int:
    """The docstring of the module, in whole numbers."""
    mask = 2**32 - 1
    h = (place // 2 * 0x9E3779B9 + (key & mask)) & mask
    h ^= h >> 16
    h = (h * 0x7FEB352D + (key >> 32)) & mask
    h ^= h >> 15
    h = (h * 0x846CA68B) & mask
    h ^= h >> 16
    half = h >> 16 if place % 2 else h & 0xFFFF
    return half - 2**16 if half >= 2**15 else half


@given(KEYS, st.integers(1, 40))
def test_the_numbers_are_those_of_the_formula(key: int, count: int) -> None:
    assert counter_bits(torch.tensor([key]), count).tolist() == [reference(place, key) for place in range(count)]


@given(KEYS)
def test_the_draw_for_the_whole_tensor_is_that_of_the_last_pair(key: int) -> None:
    low, high = (reference(2 * 0xFFFFFFFF + odd, key) & 0xFFFF for odd in (0, 1))
    assert unit_draw(torch.tensor([key])).item() == ((high << 16 | low) >> 8) / 2**24


def test_a_key_follows_the_seed_and_fits_what_kernels_take() -> None:
    keys = torch.cat([draw_key("cpu") for _ in range(200)])
    assert keys.dtype == torch.int64
    assert (keys >= 0).all()
    assert keys.unique().numel() == 200
    torch.manual_seed(0)
    assert torch.equal(draw_key("cpu"), keys[:1])


def test_noise_is_uniform_and_never_on_an_end() -> None:
    count = 2**20
    noise = counter_noise(torch.empty(count), torch.tensor([7]))
    assert noise.abs().max() < 0.5
    assert noise.mean().abs() < 5 * (1 / 12 / count) ** 0.5
    assert noise.double().var().item() == pytest.approx(1 / 12, rel=5 * (0.8 / count) ** 0.5)
    counts = torch.histc(noise, 256, -0.5, 0.5)
    chi_squared = float(((counts - count / 256) ** 2 / (count / 256)).sum())
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_neighbours_know_nothing_of_each_other() -> None:
    noise = counter_noise(torch.empty(400_000), torch.tensor([3]))
    for lag in (1, 2, 3, 4, 7, 16, 64, 512, 4096):
        a, b = noise[:-lag], noise[lag:]
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / 390_000**0.5, lag


@pytest.mark.parametrize("shared", [0, 2**32 - 1], ids=["nothing in common", "the low half in common"])
def test_two_keys_give_noise_that_has_nothing_in_common(shared: int) -> None:
    for first, second in torch.randint(2**62, (10, 2)):
        second = (second & ~shared) | (first & shared)
        a, b = (counter_noise(torch.empty(200_000), key.reshape(1)) for key in (first, second))
        for lag in (0, 1, 2, 8):
            correlation = torch.corrcoef(torch.stack([a, b.roll(lag)]))[0, 1].item()
            assert abs(correlation) < 6 / 200_000**0.5, (first, second, lag)


def test_draws_for_whole_tensors_are_uniform_and_know_nothing_of_the_noise() -> None:
    keys = torch.randint(2**62, (4000,))
    draws = torch.cat([unit_draw(key.reshape(1)) for key in keys])
    firsts = torch.cat([counter_noise(torch.empty(1), key.reshape(1)) for key in keys])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / 4000) ** 0.5)
    assert abs(torch.corrcoef(torch.stack([draws, firsts]))[0, 1].item()) < 5 / 4000**0.5


def test_noise_goes_by_the_order_of_memory() -> None:
    key, x = torch.tensor([5]), torch.zeros(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(in_memory_order(counter_noise(x, key)), in_memory_order(counter_noise(last, key)))
    assert counter_noise(last, key).stride() == last.stride()


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(3, 4).T, False),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), True),
        (torch.zeros(1).expand(7), False),
        (torch.zeros(8)[::2], False),
    ],
)
def test_dense_means_without_gaps_or_overlaps(x: torch.Tensor, dense: bool) -> None:
    assert is_dense(x) is dense
