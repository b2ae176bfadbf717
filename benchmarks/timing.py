"""Timing several things side by side: interleaved rounds, medians and quartiles, ratios within a round."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from scipy.stats import quantile_test

from benchmarks.memory import give_back

Samples = dict[str, list[float]]


class Quartiles(NamedTuple):
    """A quarter of the samples lies below ``low``, half below ``median``, a quarter above ``high``.

    Of :func:`median_interval`, ``low`` and ``high`` are the ends of the interval.
    """

    low: float
    median: float
    high: float

    def times(self, factor: float) -> Quartiles:
        """In another unit."""
        return Quartiles(*(value * factor for value in self))

    def rounded(self) -> list[float]:
        """Four digits each, for a result file."""
        return [float(f"{value:.4g}") for value in self]


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Quartiles by linear interpolation between the samples; of one sample, that sample thrice.

    Args:
        samples: at least one.
    """
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def median_interval(samples: Sequence[float]) -> Quartiles:
    """The median between the ends of its 95 % confidence interval, by the order of the samples alone.

    Args:
        samples: at least six, drawn independently.
    """
    found = quantile_test(samples, p=0.5).confidence_interval(0.95)
    return Quartiles(float(found.low), statistics.median(samples), float(found.high))


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Quartiles:
    """Quartiles of the ratio within each round: what slowed a whole round down falls out.

    Args:
        samples: one for each round.
        reference: as many, of the same rounds.
    """
    return quartiles([sample / base for sample, base in zip(samples, reference, strict=True)])


def total(*parts: Sequence[float]) -> list[float]:
    """Sum within each round."""
    return [sum(round_) for round_ in zip(*parts, strict=True)]


def clock(threads: int) -> Callable[[], float]:
    """CPU time of this process for one thread, which others cannot lengthen by taking turns; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads, and no garbage be collected but by hand, which frozen objects do not slow down.

    One thread stays on one core: cores of one machine may differ by half, by what runs beside them on the same silicon.
    """
    before, allowed = torch.get_num_threads(), cores()
    torch.set_num_threads(threads)
    if threads == 1 and allowed:
        os.sched_setaffinity(0, {max(allowed)})
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        torch.set_num_threads(before)
        if allowed:
            os.sched_setaffinity(0, allowed)


def cores() -> set[int]:
    """Those that this thread may run on; none where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def interleaved(
    tasks: Mapping[str, Callable[[], object]], rounds: int, *, threads: int = 1, least: float = 0.0, large: bool = False
) -> Samples:
    """Run all tasks in turn, round after round, each round beginning with another one.

    Before each sample the task runs once, so that its memory is at hand and its data in the caches, as in a loop of its
    own.

    Args:
        tasks: what to time, by name; each leaves the machine as it found it.
        rounds: samples of each.
        threads: that torch may use; 1 counts CPU time, more count wall time.
        least: seconds of one sample; a task that takes less is repeated within the sample.
        large: the tasks need much memory: before each sample, what others left free is given back to the system.

    Returns:
        Seconds of one call, by name and round.
    """
    samples: Samples = {name: [] for name in tasks}
    with on_threads(threads):
        repeats = {name: _repeats(task, least, clock(threads)) for name, task in tasks.items()}
        for place in range(rounds):
            for name in rotated(tasks, place):
                if large:
                    give_back()
                tasks[name]()
                samples[name].append(_seconds(tasks[name], repeats[name], clock(threads)))
                gc.collect()
    return samples


def rotated(names: Iterable[str], places: int) -> list[str]:
    """The names from another start on, so that no task always follows the same cold cache."""
    names = list(names)
    places %= len(names)
    return names[places:] + names[:places]


def _seconds(task: Callable[[], object], repeats: int, now: Callable[[], float]) -> float:
    start = now()
    for _ in range(repeats):
        task()
    return (now() - start) / repeats


def _repeats(task: Callable[[], object], least: float, now: Callable[[], float]) -> int:
    for _ in range(2):
        task()
    gc.collect()
    return max(1, round(least / max(_seconds(task, 1, now), 1e-7))) if least else 1
