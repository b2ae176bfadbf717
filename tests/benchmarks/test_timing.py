from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from benchmarks.timing import (
    Quartiles,
    clock,
    cores,
    interleaved,
    median_interval,
    on_threads,
    quartiles,
    ratio,
    rotated,
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


def test_each_round_begins_with_another_task() -> None:
    assert [rotated("abc", places)[0] for places in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated("abc", 2)) == ["a", "b", "c"]


def test_every_task_is_timed_once_a_round_after_it_was_tried() -> None:
    calls: Counter[str] = Counter()
    tasks = {name: lambda name=name: calls.update([name]) for name in "ab"}
    samples = interleaved(tasks, rounds=3)
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}
    assert calls["a"] == calls["b"] == 2 + 2 * 3


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``work(seconds)`` lets so much time pass on the clock of the measurements, on any machine."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.timing.clock", lambda _threads: lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_a_short_task_is_repeated_within_a_sample(work: Callable[[float], None]) -> None:
    calls: Counter[str] = Counter()

    def task() -> None:
        calls.update(["a"])
        work(1e-5)

    samples = interleaved({"a": task}, rounds=1, least=1e-3)
    assert calls["a"] > 100
    assert samples["a"] == [pytest.approx(1e-5)]


def test_longer_tasks_have_longer_times(work: Callable[[float], None]) -> None:
    samples = interleaved({"short": lambda: work(1), "long": lambda: work(1000)}, rounds=5)
    assert samples == {"short": [1.0] * 5, "long": [1000.0] * 5}


def test_cpu_time_for_one_thread_and_wall_time_for_more() -> None:
    assert (clock(1), clock(2)) == (time.process_time, time.perf_counter)


def test_threads_and_the_collector_are_restored() -> None:
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert not gc.isenabled()
    assert torch.get_num_threads() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_one_thread_stays_on_one_core() -> None:
    before = cores()  # none where the system does not say
    with on_threads(1):
        assert len(cores()) == min(1, len(before))
    assert cores() == before
    with on_threads(2):
        assert cores() == before
