"""What only an NVIDIA GPU can show of the Triton kernels: no waiting, CUDA graphs, very large tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.triton import proxy_backward, proxy_forward, round_backward, round_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SETTINGS = ProxySettings(SIGNED, 2.0, 8.0, (2, 3, 4, 5, 6, 7, 8), stochastic=True)


def parameters() -> ProxyTensors:
    return ProxyTensors(torch.ones(1).cuda(), draw_key("cuda"), bit_raw=torch.zeros(1).cuda())


def step(x: Tensor, grad: Tensor, tensors: ProxyTensors) -> list[Tensor]:
    """All kernels once."""
    y = proxy_forward(x, tensors, SETTINGS)
    dx, d_alpha, d_bits = proxy_backward(grad, y, tensors, SETTINGS)
    alpha, bits = tensors.alpha_raw, torch.full((1,), 4.0, device="cuda")
    assert d_bits is not None
    rounded = round_forward(x, alpha, bits, SIGNED, 0, math.inf)
    return [y, dx, d_alpha, d_bits, rounded, *round_backward(grad, x, alpha, bits, SIGNED, 0, math.inf)]


def test_no_kernel_waits_for_the_gpu_and_sums_have_one_order() -> None:
    x, grad, tensors = torch.randn(3_000_000).cuda(), torch.randn(3_000_000).cuda(), parameters()
    first = step(x, grad, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step(x, grad, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_recorded_step_played_again_sees_new_parameters_and_a_new_key() -> None:
    x, grad, tensors = torch.randn(50_000).cuda(), torch.randn(50_000).cuda(), parameters()
    before = step(x, grad, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x, grad, tensors)
    assert tensors.bit_raw is not None
    for changed in (tensors.alpha_raw, tensors.bit_raw, tensors.key):
        changed.add_(1)
    graph.replay()
    expected = step(x, grad, tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(before[0], found[0])


def test_more_elements_than_31_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    size, tail, tensors = 2**31 + 4096, 5000, parameters()
    x = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
    x[-tail:] = torch.randn(tail, device="cuda")
    y = proxy_forward(x, tensors, SETTINGS)
    assert (y[-tail:] != x[-tail:]).float().mean() > 0.5
    grad = torch.zeros_like(x)
    grad[-1] = 1
    y.fill_(math.nan)  # in range, whatever the range
    dx, *_ = proxy_backward(grad, y, tensors, SETTINGS)
    assert (float(dx[-1]), int(dx.count_nonzero())) == (1, 1)
