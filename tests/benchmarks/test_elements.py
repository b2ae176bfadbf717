from __future__ import annotations

import pytest
import torch

from benchmarks.elements import fixed_cost, functions, kept_bytes, measure
from benchmarks.plain import plain_operations
from nipq.kernels.cpu import available
from nipq.kernels.dispatch import backend

needs_kernels = pytest.mark.skipif(not available(), reason="no C++ compiler")


def test_every_function_is_timed_in_both_directions() -> None:
    names = ("ReLU", "nipq", "torch learnable fake-quant", "nipq, published sampler, plain operations")
    case = measure(1 << 10, "float32", 1, 2, names)
    assert set(case["rows"]) == set(names)
    for row in case["rows"].values():
        assert all(row[part][0] > 0 for part in ("forward", "backward", "ratio"))
    assert case["notes"] == []


def test_a_call_on_few_elements_has_a_cost() -> None:
    assert fixed_cost(2, ("ReLU",))["ReLU"][1] > 0


@needs_kernels
def test_the_noise_proxy_keeps_its_result_alone() -> None:
    x = torch.randn(1 << 14, requires_grad=True)
    found = functions(("ReLU", "nipq", "torch learnable fake-quant"))
    kept = {name: kept_bytes(function, x) for name, (function, _) in found.items()}
    assert kept["ReLU"] == 0
    assert kept["nipq"] < 0.01
    assert kept["torch learnable fake-quant"] >= 4  # x


@needs_kernels
def test_plain_operations_have_no_kernels_inside() -> None:
    x, alpha = torch.randn(8), torch.ones(1)
    with plain_operations():
        assert backend(x, alpha, 0) is None
    assert backend(x, alpha, 0) is not None
