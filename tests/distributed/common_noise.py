"""The noise of one process on every rank, so that many can be compared with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nipq.distributed import rank, world_size
from nipq.nn.quantizer import InputQuantizer


@contextmanager
def common_noise() -> Iterator[None]:
    """Give every sample and weight the noise that it has in one process.

    Ranks that are seeded alike draw the same keys; each computes the noise of the whole batch and uses its slice, as
    if the batch of one process were theirs one behind the other.
    """
    search = InputQuantizer._search

    def of_the_whole_batch(self: InputQuantizer, x: Tensor, key: Tensor) -> Tensor:
        return search(self, torch.cat([x] * world_size()), key).chunk(world_size())[rank()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nipq.kernels.dispatch.backend", lambda *_: None)
        patch.setattr("nipq.nn.estimators.backend", lambda *_: None)
        patch.setattr(InputQuantizer, "_search", of_the_whole_batch)
        yield
