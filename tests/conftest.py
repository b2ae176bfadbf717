"""What every test starts from."""

from __future__ import annotations

import os

# No test may depend on a display or on how many cores there are; the kernels of one thread add in one order.
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
