"""Sizes of the Triton kernels: which ones are used, and what is believed of a file."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch

from nipq.errors import FileFormatError
from nipq.kernels.triton_tiles import (
    ALLOWED,
    Sizes,
    keep_sizes,
    kept_sizes,
    on_trial,
    read_sizes,
    sizes_file,
    sizes_for,
    tiling,
)

FOUND = Sizes(tile=2048, programs=8192, programs_per_channel=512, warps=8)


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch):
    """A cache folder of its own and a GPU by name alone."""
    monkeypatch.setenv("NIPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    kept_sizes.cache_clear()
    yield "a GPU"
    kept_sizes.cache_clear()


def test_a_gpu_has_the_usual_sizes_until_others_are_kept(gpu) -> None:
    assert sizes_for(torch.device("cuda", 0)) == Sizes()
    keep_sizes(gpu, FOUND)
    assert sizes_for(torch.device("cuda", 0)) == FOUND
    assert sizes_for(torch.device("cpu")) == Sizes()


def test_sizes_on_trial_end_with_the_trial_and_after_an_error_too() -> None:
    x = torch.empty(100_000)
    with on_trial(FOUND):
        assert tiling(x, 1, 0).shape == (1, 1, 2048)
        assert tiling(x, 1, 0).options["num_warps"] == 8
    assert tiling(x, 1, 0).shape == (1, 1, 1024)
    with suppress(RuntimeError), on_trial(FOUND):
        raise RuntimeError
    assert tiling(x, 1, 0).shape == (1, 1, 1024)


@pytest.mark.parametrize("sizes", [Sizes(), FOUND, Sizes(256, 1024, 256, 2)])
@pytest.mark.parametrize(("shape", "channels"), [((100_003,), 1), ((70, 9, 3, 3), 70), ((3, 5000), 3)])
def test_every_element_lies_in_one_tile(sizes, shape, channels) -> None:
    with on_trial(sizes):
        tiles = tiling(torch.empty(shape), channels, 0)
    rows, own, inner = tiles.size
    assert rows * own * inner == torch.empty(shape).numel()
    groups = -(-rows // tiles.shape[0]) * -(-inner // tiles.shape[2])
    assert tiles.tiles == groups
    assert tiles.groups * tiles.shape[1] >= own
    assert (tiles.chunks - 1) * tiles.share < tiles.tiles <= tiles.chunks * tiles.share


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"sizes": {"tile": 1000, "programs": 4096, "programs_per_channel": 1024, "warps": 4}}),
        json.dumps({"sizes": {"tile": 1024, "programs": 4096, "programs_per_channel": 1024}}),
        json.dumps({"sizes": {"tile": 1024, "programs": 4096, "programs_per_channel": 1024, "warps": 4, "more": 1}}),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_name(gpu, text) -> None:
    path = keep_sizes(gpu, FOUND)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError, match=path.name):
        read_sizes(path)
    with pytest.raises(FileFormatError, match="Delete the file"):
        sizes_for(torch.device("cuda", 0))


def test_each_kind_of_gpu_has_a_file() -> None:
    assert sizes_file("one") != sizes_file("another")


def test_the_usual_sizes_are_among_those_that_may_be() -> None:
    assert all(getattr(Sizes(), name) in values for name, values in ALLOWED.items())
