"""A prepared model compiles whole: no graph break, no recompilation but for a phase, the numbers of eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED, Grid
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.cpu import library
from nipq.kernels.dispatch import plain_noise_proxy, proxy_operator, quantize_operator
from nipq.prepare.layer_table import set_phase_

compiled_kernels = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler, which uses what torch has deprecated
        yield
    torch._dynamo.reset()


def proxy_arguments(channels: int) -> tuple[Tensor, ProxyTensors, ProxySettings]:
    alpha_raw, bit_raw = torch.randn(channels).requires_grad_(), torch.zeros(1, requires_grad=True)
    settings = ProxySettings(Grid("shifted", 0.375), 1.5, 8.5, tuple(range(2, 9)), True, 0)
    return torch.randn(channels, 40, requires_grad=True), ProxyTensors(alpha_raw, draw_key("cpu"), bit_raw), settings


@compiled_kernels
@pytest.mark.parametrize("channels", [1, 6])
def test_the_operator_of_the_proxy_keeps_its_promises_to_the_compiler(channels: int) -> None:
    """Schema, shapes without data, and gradients, as torch checks them."""
    x, tensors, settings = proxy_arguments(channels)
    args = (
        x, tensors.alpha_raw, tensors.key, tensors.bit_raw, None, None, None, None,
        "shifted", 0.375, settings.low, settings.high, list(settings.choices), True, 0, settings.cap,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.nipq.proxy, args)
    leaves = (x, tensors.alpha_raw, tensors.bit_raw)
    found = [
        torch.autograd.grad(function(x, tensors, settings).square().sum(), leaves)
        for function in (proxy_operator, plain_noise_proxy)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@compiled_kernels
def test_the_operator_of_the_quantizer_keeps_its_promises_to_the_compiler() -> None:
    x, alpha, bits = (part.requires_grad_() for part in (torch.randn(4, 30), torch.ones(4, 1), torch.tensor([3.0])))
    torch.library.opcheck(torch.ops.nipq.quantize, (x, alpha, bits, "signed", 0.0, 0, float("inf")))
    assert torch.equal(quantize_operator(x, alpha, bits, SIGNED, 0), nipq.functional.quantize(x, alpha, bits, SIGNED))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(),
        nn.Flatten(), nn.Linear(8 * 36, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    nipq.prepare_(model, x)
    nipq.calibrate_(model, [(x, torch.zeros(4))])
    return model.train()


def losses(model: nn.Module, call: Callable[[Tensor], Tensor], steps: int) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    optimizer = torch.optim.SGD(nipq.param_groups(model, lr=0.05), lr=0.05)
    found = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def unique_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_training_compiles_whole_and_once_a_phase_with_the_numbers_of_eager() -> None:
    """The AOT backend: everything of the compiler but the code it writes."""
    eager, model = small_net(), small_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert losses(model, compiled, 4) == pytest.approx(losses(eager, eager, 4), rel=1e-5)
    assert unique_graphs() == 1
    for phase, graphs in (("round", 2), ("noise", 2), ("float", 3)):
        for net in (eager, model):
            set_phase_(net, phase)
        assert losses(model, compiled, 2) == pytest.approx(losses(eager, eager, 2), rel=1e-5)
        assert unique_graphs() == graphs
    with torch.no_grad():
        x = torch.randn(8, 3, 8, 8)
        for net in (eager, model):
            set_phase_(net, "round")
            net.eval()
        assert torch.equal(compiled(x), eager(x))


@pytest.mark.slow
def test_the_default_compiler_trains_to_the_numbers_of_eager() -> None:
    eager, model = small_net(), small_net()
    compiled = torch.compile(model, fullgraph=True)
    assert losses(model, compiled, 6) == pytest.approx(losses(eager, eager, 6), rel=0.2)
    assert unique_graphs() == 1
