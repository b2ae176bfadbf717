"""Bit parameters, rounding and stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nipq.errors import ConfigError
from nipq.functional.bitwidth import bits_from_raw, raw_from_bits, round_bits, stochastic_round_bits

CHOICES = [(2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (3,), (2, 16)]
properties = settings(deadline=None, max_examples=60)
choices_of = st.sets(st.integers(2, 16), min_size=1).map(lambda s: tuple(sorted(s)))


@pytest.mark.parametrize(("bits", "slope"), [(8.0, 3.0), (4.0, 5 / 3), (3.0, 11 / 12)])
def test_slope_of_the_published_range(bits: float, slope: float) -> None:
    """Section 1.5: (b - 2)(14 - b)/12, that is 3 at 8 bits, 1.67 at 4, 0.92 at 3."""
    raw = raw_from_bits(torch.tensor([bits], dtype=torch.float64), 2, 14).requires_grad_()
    value = bits_from_raw(raw, 2, 14)
    assert value.item() == pytest.approx(bits, abs=1e-13)
    assert torch.autograd.grad(value, raw)[0].item() == pytest.approx(slope, rel=1e-12)


@properties
@given(low=st.integers(2, 8), width=st.integers(1, 12), share=st.floats(0.002, 0.998))
def test_raw_and_bits_are_inverse(low: int, width: int, share: float) -> None:
    bits = torch.tensor([low + width * share], dtype=torch.float64)
    raw = raw_from_bits(bits, low, low + width)
    torch.testing.assert_close(bits_from_raw(raw, low, low + width), bits, rtol=0, atol=1e-12)


def test_the_ends_of_the_range_have_a_finite_parameter_close_by() -> None:
    ends = torch.tensor([2.0, 8.0])
    raw = raw_from_bits(ends, 2, 8)
    assert raw.isfinite().all()
    torch.testing.assert_close(bits_from_raw(raw, 2, 8), ends, rtol=0, atol=0.0061)


def test_raw_from_bits_takes_a_plain_number() -> None:
    assert raw_from_bits(5, 2, 8).item() == 0


@pytest.mark.parametrize("bits", [1.9, 8.1, float("nan")])
def test_bits_outside_the_range_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="expected bits from 2 to 8; found"):
        raw_from_bits(torch.tensor([5.0, bits]), 2, 8)


@pytest.mark.parametrize(("low", "high"), [(4, 4), (8, 2)])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match=f"low end below its high end; found {low} to {high}"):
        raw_from_bits(torch.tensor([4.0]), low, high)


@properties
@given(bits=st.floats(2, 16), choices=choices_of)
def test_rounding_takes_the_nearest_choice(bits: float, choices: tuple[int, ...]) -> None:
    got = round_bits(torch.tensor([bits], dtype=torch.float64), choices).item()
    assert got in choices
    assert abs(got - bits) == min(abs(c - bits) for c in choices)


def test_of_two_equally_near_choices_the_lower_is_taken() -> None:
    assert round_bits(torch.tensor([2.5, 3.5, 7.5]), (2, 3, 4, 5, 6, 7, 8)).tolist() == [2, 3, 7]
    assert round_bits(torch.tensor([3.0, 6.0]), (2, 4, 8)).tolist() == [2, 4]


def test_rounding_gives_exact_whole_numbers_whatever_the_bits() -> None:
    bits = torch.rand(1000) * 14 + 2
    got = round_bits(bits, tuple(range(2, 17)))
    assert torch.equal(got, got.round())


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("rounding", [round_bits, stochastic_round_bits])
def test_t11_the_gradient_is_the_identity(rounding, choices: tuple[int, ...]) -> None:
    bits = torch.tensor([2.0, 3.3, 7.9], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 5.0])
    (grad,) = torch.autograd.grad((weights * rounding(bits, choices)).sum(), bits)
    assert torch.equal(grad, weights)


@pytest.mark.parametrize("choices", [(2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (2, 16)])
@pytest.mark.parametrize("bits", [3.3, 2.1, 6.75])
def test_t11_stochastic_rounding_is_unbiased_between_neighbours(choices: tuple[int, ...], bits: float) -> None:
    """Reference: mean 3.3005 for 3.3 with support {3, 4}."""
    draws = 100_000
    got = stochastic_round_bits(torch.full((draws,), bits), choices)
    lower, upper = max(c for c in choices if c <= bits), min(c for c in choices if c > bits)
    assert sorted(set(got.tolist())) == [lower, upper]
    error = ((bits - lower) * (upper - bits) / draws) ** 0.5
    assert abs(got.double().mean().item() - bits) < 5 * error + 1e-6


@pytest.mark.parametrize("choices", CHOICES)
def test_a_choice_itself_and_bits_beyond_the_ends_leave_nothing_to_chance(choices: tuple[int, ...]) -> None:
    for choice in choices:
        assert (stochastic_round_bits(torch.full((500,), float(choice)), choices) == choice).all()
    assert (stochastic_round_bits(torch.full((500,), 1.5), choices) == choices[0]).all()
    assert (stochastic_round_bits(torch.full((500,), 17.0), choices) == choices[-1]).all()


def test_the_draw_decides_and_leaves_torchs_own_generator_alone() -> None:
    bits = torch.full((4,), 3.25)
    before = torch.get_rng_state()
    got = stochastic_round_bits(bits, (3, 4), torch.tensor([0.0, 0.24, 0.25, 0.99]))
    assert got.tolist() == [4.0, 4.0, 3.0, 3.0]
    assert torch.equal(torch.get_rng_state(), before)
