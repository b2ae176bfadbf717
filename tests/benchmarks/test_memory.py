from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.memory import peak_growth, saved_bytes

SIZE = 1 << 20


def test_each_stretch_of_memory_counts_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: torch.relu(x)) == 4000  # its result
    assert saved_bytes(lambda: x * x) == 4000  # x, twice
    assert saved_bytes(lambda: x.view(10, 100) * x.view(10, 100)) == 4000  # the same stretch behind two views
    assert saved_bytes(lambda: x + 1) == 0


def test_the_result_is_left_out_where_it_is_kept_anyway() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: torch.relu(x), result=False) == 0
    assert saved_bytes(lambda: x * x, result=False) == 4000


def test_what_is_there_anyway_does_not_count() -> None:
    x, weight = torch.ones(10, 10), torch.ones(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x @ weight, without=[weight]) == 400


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from the process' status")
def test_growth_is_at_least_what_is_written() -> None:
    growth = peak_growth(lambda: torch.ones(8 * SIZE))
    assert growth is None or 0.9 < growth / (4 * 8 * SIZE) < 4  # the system counts in steps of many pages
