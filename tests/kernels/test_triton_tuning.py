"""The search for sizes, by a clock that is made up; a real one needs a GPU."""

from __future__ import annotations

import pytest
import torch

from nipq.errors import MissingDependencyError
from nipq.kernels.triton_tiles import Sizes, sizes_for
from nipq.kernels.triton_tuning import Tuned, search, tune

BEST = Sizes(tile=2048, programs=8192, programs_per_channel=256, warps=8)


def slowness() -> float:
    """Milliseconds that grow with every size that is not the best one."""
    now = sizes_for(torch.device("cpu"))
    return 1.0 + sum(getattr(now, name) != getattr(BEST, name) for name in ("tile", "programs", "warps"))


def slowness_per_channel() -> float:
    now = sizes_for(torch.device("cpu"))
    return 1.0 + (now.programs_per_channel != BEST.programs_per_channel)


def test_the_fastest_sizes_are_found_and_told_beside_the_usual_ones() -> None:
    sizes, usual, found = search((slowness, slowness_per_channel), lambda step: step())
    assert sizes == BEST
    assert usual == (4.0, 2.0)
    assert found == (1.0, 1.0)


def test_where_nothing_is_faster_the_usual_sizes_stay() -> None:
    sizes, usual, found = search((lambda: 1.0, lambda: 1.0), lambda step: step())
    assert sizes == Sizes()
    assert usual == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    with pytest.raises(MissingDependencyError, match="expected an NVIDIA GPU"):
        tune()


def test_what_was_found_is_one_line(tmp_path) -> None:
    found = Tuned("a GPU", BEST, (0.5, 0.25), (0.25, 0.25), tmp_path / "sizes.json")
    assert "0.500 ms where the usual sizes take 0.750" in str(found)
