from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nipq.functional.clipping import even_stride


@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4), most=st.integers(1, 500))
def test_every_column_is_met_before_one_is_met_again(shape: list[int], most: int) -> None:
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    stride = even_stride(len(places), most)
    kept = places[::stride]
    assert len(kept) <= most or stride == 1
    inner = shape[-1]
    assert len(kept[:inner, -1].unique()) == len(kept[:inner])


def test_as_many_as_are_asked_for_but_for_the_search_of_a_coprime() -> None:
    assert even_stride(2**20, 2**12) == 257
    assert even_stride(8 * 528 * 27 * 27, 2**14) == 191  # 188 would be even, 189 is 7 rows
    assert even_stride(0, 5) == even_stride(5, 5) == 1
