"""Seeds depend on every part, and on nothing else."""

from __future__ import annotations

from nipq.train.batches import seed_of


def test_seeds_differ_by_part_and_place() -> None:
    seeds = {seed_of(run, stage, epoch) for run in range(5) for stage in ("float", "search") for epoch in range(20)}
    assert len(seeds) == 5 * 2 * 20
    assert seed_of(1, 12) != seed_of(11, 2)


def test_seeds_stay_the_same_between_versions() -> None:
    assert seed_of(0, "search", 1) == 182309332035303724
