"""The Triton kernels give the numbers of the plain maths: values to the bit, gradients to rounding.

On an NVIDIA GPU, or in Triton's interpreter: ``test_triton_without_gpu.py`` runs this file so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import nipq.functional.uniform as uniform
import nipq.kernels.triton as kernels
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import BALANCED, SIGNED, UNSIGNED, Grid
from nipq.functional.noise import error_table
from nipq.kernels import dispatch as rounding
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.dispatch import Backend, fused_noise_proxy, plain_noise_proxy
from nipq.kernels.triton import interpreting, tl, triton
from nipq.kernels.triton_tiles import Sizes, on_trial, tiling
from nipq.kernels.triton_tuning import proxy_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()),
    reason="needs an NVIDIA GPU or Triton's interpreter (test_triton_without_gpu.py starts it)",
)

KERNELS = Backend(
    kernels.supported, kernels.proxy_forward, kernels.proxy_backward, kernels.round_forward, kernels.round_backward,
)  # fmt: skip
GRIDS = [SIGNED, UNSIGNED, Grid("shifted", 0.375), BALANCED]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
RANGE = tuple(range(2, 9))

# Shape, memory format, boundaries and their axis: whole tensors, weights, few neighbours, channels apart in memory.
LAYOUTS = {
    "odd": ((2501,), torch.contiguous_format, 1, 0),
    "one": ((1,), torch.contiguous_format, 1, 0),
    "channels last": ((2, 8, 5, 6), torch.channels_last, 1, 0),
    "weights": ((5, 13, 3, 3), torch.contiguous_format, 5, 0),
    "depthwise": ((40, 1, 3, 3), torch.contiguous_format, 40, 0),
    "long rows": ((3, 1100), torch.contiguous_format, 3, 0),
    "transposed": ((7, 6, 2, 2), torch.contiguous_format, 6, 1),
    "weights, channels last": ((5, 13, 3, 3), torch.channels_last, 5, 0),
    "activations, channels last": ((3, 20, 5, 6), torch.channels_last, 20, 1),
    "volumes": ((2, 5, 3, 4, 4), torch.channels_last_3d, 5, 1),
}


# Every pair of layout, type and grid; all three together where the most can differ.
CASES = [
    pytest.param(*LAYOUTS[layout], dtype, grid, id=f"{layout}, {str(dtype)[6:]}, {grid.kind}")
    for i, layout in enumerate(LAYOUTS)
    for j, dtype in enumerate(TYPES)
    for k, grid in enumerate(GRIDS)
    if layout in ("odd", "transposed") or (i + j + k) % 3 == 0
]


@pytest.fixture(autouse=True)
def _interpreter_rounds_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts digits off where a GPU rounds to the nearest, ties to even."""
    if not interpreting():
        return
    interpreter = triton.runtime.interpreter
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).copy())
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def settings(grid: Grid = SIGNED, choices: tuple[int, ...] = RANGE, **other: bool | int) -> ProxySettings:
    return ProxySettings(grid, choices[0] - 0.5, choices[-1] + 0.5, choices, **{"stochastic": True, **other})


def parameters(channels: int = 1, raw: float = 0.3) -> ProxyTensors:
    alpha_raw = (torch.randn(channels) + 1.5).to(DEVICE).requires_grad_()
    return ProxyTensors(alpha_raw, draw_key(DEVICE), bit_raw=torch.tensor([raw], device=DEVICE, requires_grad=True))


def triton_noise_proxy(x: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> Tensor:
    assert KERNELS.supported(x, tensors.alpha_raw, chosen.channel_axis)
    return fused_noise_proxy(x, tensors, chosen, KERNELS)


@torch.no_grad()
def expected_proxy(x: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> Tensor:
    """The plain proxy in float32, rounded once; in-range results on an end moved inward by one number of the type."""
    y, uncapped = plain_noise_proxy(x, tensors, chosen), replace(chosen, cap=math.inf)
    for end, by in ((-math.inf, 1), (math.inf, -1)):
        exact = plain_noise_proxy(torch.full_like(x, end, dtype=torch.float32), tensors, uncapped)
        inside = x.float() > exact if by == 1 else x.clamp(max=chosen.cap).float() < exact
        stored = exact.to(x.dtype)
        y = torch.where((y == stored) & inside, inward(stored, by), y)
    return y


def inward(end: Tensor, by: int) -> Tensor:
    """The next number of the type above (1) or below (-1); next to 0 a normal one, but for float16."""
    number = end.view(torch.int32 if end.dtype == torch.float32 else torch.int16)
    neighbour = torch.where(end > 0, number + by, number - by).view(end.dtype)
    return torch.where(end == 0, by * (2.0**-24 if end.dtype == torch.float16 else 2.0**-126), neighbour)


def gradients(function, x: Tensor, grad: Tensor, inputs: Sequence[Tensor | None], *rest: object) -> tuple[Tensor, ...]:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf, *rest), [leaf, *(p for p in inputs if p is not None)], grad)


def assert_close(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], grad: Tensor) -> None:
    assert torch.equal(ours[0], plain[0])
    scale = grad.float().abs().sum().item()  # sums of terms of either sign: relative to what was added up
    for one, other in zip(ours[1:], plain[1:], strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * scale)


def assert_equal(x: Tensor, tensors: ProxyTensors, chosen: ProxySettings) -> None:
    grad = torch.randn_like(x)
    y = triton_noise_proxy(x, tensors, chosen)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert torch.equal(y, expected_proxy(x, tensors, chosen))
    inputs = [tensors.alpha_raw, tensors.bit_raw]
    ours = gradients(triton_noise_proxy, x, grad, inputs, tensors, chosen)
    plain = gradients(plain_noise_proxy, x.float(), grad.float(), inputs, tensors, chosen)
    assert_close(ours, (plain[0].to(x.dtype), *plain[1:]), grad)


@pytest.mark.parametrize(("shape", "memory", "channels", "axis", "dtype", "grid"), CASES)
def test_proxy_of_every_type_layout_and_grid(shape, memory, channels, axis, dtype, grid) -> None:
    x = (2 * torch.randn(shape)).to(DEVICE, dtype).contiguous(memory_format=memory)
    assert_equal(x, parameters(channels), settings(grid, channel_axis=axis))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("choices", [RANGE, (2, 4, 8), (3, 16), (5,)])
def test_the_bit_width_is_drawn_alike(choices: tuple[int, ...], stochastic: bool) -> None:
    for raw in (-9.0, -1.7, 0.0, 0.6, 9.0):
        x, tensors = torch.randn(90, device=DEVICE), parameters(raw=raw)
        assert_equal(x, tensors, settings(choices=choices, stochastic=stochastic))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_a_fixed_bit_width_and_one_drawn_before(bits: int, grid: Grid) -> None:
    x, tensors = torch.randn(300, device=DEVICE), parameters()
    assert_equal(x, replace(tensors, bit_raw=None, bits_frozen=torch.tensor([bits], device=DEVICE)), settings(grid))
    assert_equal(x, replace(tensors, bits=torch.tensor([float(bits)], device=DEVICE)), settings(grid))


@pytest.mark.parametrize("raw", [-40.0, -12.0, -3.0, 19.9, 20.1, 60.0])
def test_boundaries_are_softplus_in_float64_rounded_once(raw: float) -> None:
    tensors = replace(parameters(), alpha_raw=torch.tensor([raw], device=DEVICE, requires_grad=True))
    x = torch.randn(300, device=DEVICE) * torch.nn.functional.softplus(tensors.alpha_raw.detach())
    for grid in (SIGNED, Grid("shifted", 0.1)):
        assert torch.equal(triton_noise_proxy(x, tensors, settings(grid)), expected_proxy(x, tensors, settings(grid)))


@pytest.mark.parametrize("layout", ["odd", "weights", "activations, channels last"])
def test_empirical_noise_from_a_table(layout: str) -> None:
    shape, memory, channels, axis = LAYOUTS[layout]
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory)
    bits = torch.tensor([3.0], device=DEVICE)
    table = error_table(x, torch.ones(1, device=DEVICE), bits, SIGNED)
    tensors = replace(parameters(channels), bits=bits, table=table.errors, table_count=table.inside)
    assert_equal(x, tensors, settings(channel_axis=axis))
    empty = replace(tensors, table_count=torch.tensor([0], device=DEVICE))
    assert_equal(x, empty, settings(channel_axis=axis))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_in_range_result_on_an_end_is_moved_off_it_so_that_backward_sees_it_in_range(dtype: torch.dtype) -> None:
    """x such that x + noise * step is 0, or the boundary."""
    tensors = replace(parameters(), bit_raw=None, bits_frozen=torch.tensor([2], device=DEVICE))
    tensors = replace(tensors, alpha_raw=torch.tensor([math.log(math.expm1(3.0))], device=DEVICE, requires_grad=True))
    half = torch.full((2000,), 1.5, device=DEVICE)
    noise = plain_noise_proxy(half, tensors, settings(UNSIGNED)).detach() - half
    for end in (0.0, 3.0):
        x = (end - noise).to(dtype)
        y = triton_noise_proxy(x, tensors, settings(UNSIGNED))
        assert torch.equal(y, expected_proxy(x, tensors, settings(UNSIGNED)))
        assert (y != plain_noise_proxy(x, tensors, settings(UNSIGNED))).any()
        (dx, _) = gradients(triton_noise_proxy, x, torch.ones_like(x), [tensors.alpha_raw], tensors, settings(UNSIGNED))
        assert torch.equal(dx, ((x > 0) & (x < 3)).to(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", ["odd", "depthwise"])
def test_the_cap_of_a_relu6_that_was_left_out(layout: str, dtype: torch.dtype) -> None:
    """Boundaries below, at and above the cap; an uncapped result that would pass for a capped one is moved down."""
    shape, memory, channels, axis = LAYOUTS[layout]
    x = (6 * torch.randn(shape)).to(DEVICE, dtype).contiguous(memory_format=memory)
    for boundary in (4.0, 6.0, 7.0) if channels == 1 else (6.0,):
        alpha_raw = (boundary + torch.arange(channels) / 20 - channels // 40).to(DEVICE).expm1().log().requires_grad_()
        tensors = replace(parameters(), alpha_raw=alpha_raw)
        chosen = settings(UNSIGNED, cap=6.0, channel_axis=axis)
        y, plain = triton_noise_proxy(x, tensors, chosen), expected_proxy(x, tensors, chosen)
        differ = y != plain
        assert torch.equal(inward(y, 1)[differ], plain[differ])
        assert differ.float().mean() < (1e-3 if dtype == torch.float32 else 0.1)
        grad, inputs = torch.randn_like(x), [tensors.alpha_raw, tensors.bit_raw]
        ours = gradients(triton_noise_proxy, x, grad, inputs, tensors, chosen)
        theirs = gradients(plain_noise_proxy, x.float(), grad.float(), inputs, tensors, chosen)
        assert_close(ours, (theirs[0].to(dtype), *theirs[1:]), grad)


def test_nan_infinity_and_an_empty_tensor() -> None:
    x, tensors = torch.tensor([math.nan, math.inf, -math.inf, 0.1], device=DEVICE), parameters()
    y = triton_noise_proxy(x, tensors, settings())
    assert y[0].isnan()
    assert torch.equal(y[1:], expected_proxy(x, tensors, settings())[1:])
    empty = torch.empty(0, 3, device=DEVICE)
    inputs = [tensors.alpha_raw, tensors.bit_raw]
    dx, d_alpha, d_bits = gradients(triton_noise_proxy, empty, empty, inputs, tensors, settings())
    assert (dx.shape, float(d_alpha), float(d_bits)) == ((0, 3), 0, 0)


def test_many_programs_of_several_tiles_each() -> None:
    """Tiles cut as for a large tensor: two programs share the sums of 6 tiles, for one boundary and for some."""
    with on_trial(Sizes(tile=256, programs=2, programs_per_channel=2)):
        for shape, channels in (((1401,), 1), ((2, 701), 2), ((9, 2, 60), 2)):
            x = torch.randn(shape, device=DEVICE)
            axis = x.ndim - 2 if channels > 1 else 0
            assert tiling(x, channels, axis).share > 1
            assert_equal(x, parameters(channels), settings(channel_axis=axis))


# ------------------------------------------------------------------------------------------------- rounding


def triton_quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, cap: float = math.inf) -> Tensor:
    axis = next((axis for axis, length in enumerate(alpha.shape) if length > 1), 0)
    return rounding._FusedStraightThrough.apply(x, alpha, bits, grid, axis, cap, KERNELS)


def plain_quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, cap: float = math.inf) -> Tensor:
    return uniform.quantize(torch.where(x < cap, x, cap).float(), alpha, bits, grid).to(x.dtype)


@pytest.mark.parametrize(("shape", "memory", "channels", "axis", "dtype", "grid"), CASES)
def test_rounding_of_every_type_layout_and_grid(shape, memory, channels, axis, dtype, grid) -> None:
    x = (2 * torch.randn(shape)).to(DEVICE, dtype).contiguous(memory_format=memory)
    alpha = (torch.rand(channels) + 1).to(DEVICE)
    alpha = alpha.reshape([-1 if i == axis else 1 for i in range(x.ndim)] if channels > 1 else [1])
    assert_rounds_alike(x, alpha, 5.0, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@pytest.mark.parametrize("bits", [2.0, 3.0, 8.0, 13.0, 16.0])
def test_rounding_to_few_bits_and_many(bits: float, grid: Grid) -> None:
    assert_rounds_alike(torch.randn(700, device=DEVICE), torch.tensor([1.3], device=DEVICE), bits, grid)


def assert_rounds_alike(x: Tensor, alpha: Tensor, number: float, grid: Grid, cap: float = math.inf) -> None:
    rest = alpha.requires_grad_(), torch.tensor([number], device=DEVICE, requires_grad=True), grid, cap
    y = triton_quantize(x, *rest)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert torch.equal(y, plain_quantize(x, *rest))
    grad = torch.randn_like(x)
    ours, plain = (gradients(quantize, x, grad, rest[:2], *rest) for quantize in (triton_quantize, plain_quantize))
    assert_close(ours, plain, grad)


@pytest.mark.parametrize("alpha", [5.0, 6.0, 7.5])
def test_rounding_behind_a_relu6_that_was_left_out(alpha: float) -> None:
    x = torch.cat([6 * torch.randn(700), torch.tensor([6.0, 0.0])]).to(DEVICE)
    assert_rounds_alike(x, torch.tensor([alpha], device=DEVICE), 4.0, UNSIGNED, 6.0)


def test_ties_go_to_the_even_code_and_nan_stays() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5, math.nan, math.inf, -math.inf], device=DEVICE)
    y = triton_quantize(x, torch.tensor([3.0], device=DEVICE), torch.tensor([3.0], device=DEVICE), SIGNED)
    assert y[:6].tolist() == [0, 2, 2, 0, -2, 3]
    assert y[6].isnan()
    assert y[7:].tolist() == [3, -3]


def test_what_there_is_no_kernel_for() -> None:
    x, one = torch.zeros(4, 4, device=DEVICE), torch.zeros(1, device=DEVICE)
    assert KERNELS.supported(x, one, 0)
    assert KERNELS.supported(x.T, one, 0)  # autograd makes it dense
    assert not KERNELS.supported(x[:, ::2], x[0], 1)
    assert not any(KERNELS.supported(other, one, 0) for other in (x.double(), x.to("meta")))
    assert not KERNELS.supported(x, one.half(), 0)


def test_sizes_change_no_value() -> None:
    """What is tuned: result and gradient of x stay as they are, sums move by rounding alone."""
    step = proxy_step((6, 300), torch.float32, 6, DEVICE)
    usual = step()
    with on_trial(Sizes(tile=512, programs=1024, programs_per_channel=256, warps=2)):
        others = step()
    assert torch.equal(usual[0], others[0])
    assert torch.equal(usual[1], others[1])
    torch.testing.assert_close(usual[2], others[2], rtol=1e-5, atol=1e-6)
