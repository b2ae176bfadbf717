from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.turns import Turns


@pytest.mark.parametrize(
    ("block", "steps", "order", "full"),
    [
        pytest.param(3, {"a": 7, "b": 7}, "aaabbbaaabbbab", [2, 2], id="turns of a block each"),
        pytest.param(1, {"a": 2, "b": 5}, "ababbbb", [1, 4], id="the longer goes on alone"),
    ],
)
def test_loops_take_turns(block: int, steps: dict[str, int], order: str, full: list[int]) -> None:
    turns, seen = Turns(block), []

    def loop(name: str) -> None:
        for _ in range(steps[name]):
            turns.step()
            seen.append(name)

    blocks = turns.run([partial(loop, name) for name in steps])
    assert "".join(seen) == order
    assert [len(found) for found in blocks] == full


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
