from __future__ import annotations

import pytest

from benchmarks.timing import (
    Quartiles,
    median_interval,
    quartiles,
    ratio,
    total,
)


def test_quartiles_of_five_numbers_are_the_second_third_and_fourth() -> None:
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == Quartiles(2, 3, 4)
    assert quartiles([7.0]) == Quartiles(7, 7, 7)


def test_the_interval_of_a_median_knows_the_order_only() -> None:
    # Of 9 samples the median lies between the 2nd and the 8th in 1 - 2 (1 + 9) / 2^9 = 96 % of all cases.
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 6.0, 9000.0, 8.0]) == Quartiles(2, 5, 8)
    assert median_interval([1.0] * 6) == Quartiles(1, 1, 1)


def test_a_ratio_is_formed_within_a_round() -> None:
    # The third round was ten times as slow for both: ratios do not notice, a ratio of means would.
    assert ratio([2, 2, 20, 2, 2], [1, 1, 10, 1, 1]) == Quartiles(2, 2, 2)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_units_and_digits() -> None:
    assert Quartiles(1.0, 2.0, 3.0).times(1e3) == Quartiles(1e3, 2e3, 3e3)
    assert Quartiles(1.23456, 123456.0, 0.00123456).rounded() == [1.235, 123500.0, 0.001235]
    assert total([1, 2], [10, 20]) == [11, 22]
