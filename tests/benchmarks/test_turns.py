from __future__ import annotations

import pytest
import torch

from benchmarks.turns import Turns


def test_two_loops_take_turns_of_a_block_each() -> None:
    turns, seen = Turns(block=3), []

    def loop(name: str, steps: int) -> None:
        for _ in range(steps):
            turns.step()
            seen.append(name)

    blocks = turns.run([lambda: loop("a", 7), lambda: loop("b", 7)])
    assert "".join(seen) == "aaabbbaaabbbab"
    assert [len(found) for found in blocks] == [2, 2]


def test_the_longer_loop_goes_on_alone() -> None:
    turns, seen = Turns(block=1), []

    def loop(name: str, steps: int) -> None:
        for _ in range(steps):
            turns.step()
            seen.append(name)

    blocks = turns.run([lambda: loop("a", 2), lambda: loop("b", 5)])
    assert "".join(seen) == "ababbbb"
    assert [len(found) for found in blocks] == [1, 4]


def test_a_block_of_more_work_takes_longer() -> None:
    turns = Turns(block=2)

    def loop(work: int) -> None:
        for _ in range(9):
            turns.step()
            sum(range(work))

    short, long = turns.run([lambda: loop(1_000), lambda: loop(300_000)])
    assert max(short) < min(long)


def test_an_error_in_one_loop_is_raised_and_holds_nobody_up() -> None:
    turns, done = Turns(block=1), []

    def broken() -> None:
        turns.step()
        raise ValueError("a batch too few")

    def whole() -> None:
        for _ in range(4):
            turns.step()
        done.append(True)

    with pytest.raises(ValueError, match="a batch too few"):
        turns.run([broken, whole])
    assert done == [True]


def test_torch_has_one_thread_in_every_loop() -> None:
    counts: list[int] = []
    Turns(block=1).run([lambda: counts.append(torch.get_num_threads())] * 2)
    assert counts == [1, 1]
