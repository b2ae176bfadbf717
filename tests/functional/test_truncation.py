"""Truncation masks at, and on either side of, the ends."""

from __future__ import annotations

import torch

from nipq.functional.uniform import inside_range, truncate, truncation_gradients

LOWER, UPPER = torch.tensor([-1.0]), torch.tensor([2.0])
X = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0, 5.0])


def test_values_and_mask() -> None:
    assert truncate(X, LOWER, UPPER).tolist() == [-1.0, -1.0, -0.5, 0.0, 2.0, 2.0]
    assert inside_range(X, LOWER, UPPER).tolist() == [0, 0, 1, 1, 0, 0]
    assert X.tolist() == [-3.0, -1.0, -0.5, 0.0, 2.0, 5.0]  # neither writes to its input


def test_gradients_go_to_x_step_and_the_nearer_end() -> None:
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    slope = torch.tensor([9.0, 9.0, 0.5, -0.25, 9.0, 9.0])
    got = truncation_gradients(grad, X, slope, (LOWER, UPPER), torch.tensor([0.1]), (True,) * 4)
    assert [None if g is None else g.tolist() for g in got] == [[0, 0, 3, 4, 0, 0], [0.5], [3], [11]]


def test_only_what_is_needed_is_computed() -> None:
    got = truncation_gradients(X, X, X, (LOWER, UPPER), torch.tensor([0.1]), (False, True, False, False))
    assert [g is None for g in got] == [True, False, True, True]
