"""The noise proxy and the true quantizer for every device: one dispatch between fused kernels and plain operations.

:func:`noise_proxy` and :func:`quantize` take the fused kernels (C++ on CPUs, Triton on GPUs) where there are some for
the tensor and the settings, and the plain operations of ``nipq.functional`` elsewhere; the numbers are the same. Under
``torch.compile`` the kernels are custom operators, which the compiler keeps whole. Eager code calls the kernels
directly, which costs a third of what an operator written in Python costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nipq.functional import proxy, uniform
from nipq.functional.bitwidth import bits_from_raw, round_bits, stochastic_round_bits
from nipq.functional.clipping import alpha_from_raw, spread_along
from nipq.functional.counter_rng import is_dense, unit_draw
from nipq.functional.grid import Grid, GridKind
from nipq.functional.noise import ErrorTable, draw_noise, error_table, mixed_noise, table_noise, true_error
from nipq.functional.uniform import widened
from nipq.kernels import cpu
from nipq.kernels.arguments import GRID_NUMBERS, ProxySettings, ProxyTensors


class Backend(NamedTuple):
    """The four kernels for one kind of device; see ``nipq.kernels.cpu`` for what each takes and returns."""

    supported: Callable[[Tensor, Tensor, int], bool]
    proxy_forward: Callable[..., Tensor]
    proxy_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    round_forward: Callable[..., Tensor]
    round_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_CPU = Backend(cpu.supported, cpu.proxy_forward, cpu.proxy_backward, cpu.round_forward, cpu.round_backward)


@cache
def _cuda() -> Backend:
    """The kernels for GPUs; imported when a tensor is on one, as Triton is slow to import."""
    from nipq.kernels import triton as cuda

    return Backend(cuda.supported, cuda.proxy_forward, cuda.proxy_backward, cuda.round_forward, cuda.round_backward)


def backend(x: Tensor, alpha: Tensor, channel_axis: int) -> Backend | None:
    """The kernels for a tensor, or None where plain operations have to do.

    Args:
        x: what is to be quantized.
        alpha: its clipping range, or the parameter of it.
        channel_axis: axis of the clipping ranges where there are several.
    """
    if x.is_cuda and torch.compiler.is_compiling():
        return None  # there the compiler fuses the plain operations into what makes x
    kernels = _cuda() if x.is_cuda else _CPU
    return kernels if kernels.supported(x, alpha, channel_axis) else None


def _kernels(x: Tensor, alpha: Tensor, channel_axis: int) -> Backend:
    found = backend(x, alpha, channel_axis)
    assert found is not None  # asked when the graph was made
    return found


# ---------------------------------------------------------------------- operators for torch.compile


@torch.library.custom_op("nipq::proxy", mutates_args=())
def _proxy(
    x: Tensor, alpha_raw: Tensor, key: Tensor, bit_raw: Tensor | None, bits_frozen: Tensor | None,
    bits: Tensor | None, table: Tensor | None, table_count: Tensor | None,
    grid: str, shift: float, low: float, high: float, choices: list[int], stochastic: bool, channel_axis: int,
    cap: float,
) -> Tensor:  # fmt: skip
    tensors = ProxyTensors(alpha_raw, key, bit_raw, bits_frozen, bits, table, table_count)
    settings = _settings(grid, shift, low, high, choices, stochastic, channel_axis, cap)
    return _kernels(x, alpha_raw, channel_axis).proxy_forward(x, tensors, settings)


@torch.library.custom_op("nipq::proxy_backward", mutates_args=())
def _proxy_backward(
    grad: Tensor, y: Tensor, alpha_raw: Tensor, key: Tensor, bit_raw: Tensor | None, bits_frozen: Tensor | None,
    bits: Tensor | None, table: Tensor | None, table_count: Tensor | None,
    grid: str, shift: float, low: float, high: float, choices: list[int], stochastic: bool, channel_axis: int,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = ProxyTensors(alpha_raw, key, bit_raw, bits_frozen, bits, table, table_count)
    settings = _settings(grid, shift, low, high, choices, stochastic, channel_axis, cap)
    dx, d_alpha, d_bits = _kernels(y, alpha_raw, channel_axis).proxy_backward(grad, y, tensors, settings)
    return dx, d_alpha, alpha_raw.new_empty(0) if d_bits is None else d_bits


def _settings(
    grid: str,
    shift: float,
    low: float,
    high: float,
    choices: list[int],
    stochastic: bool,
    channel_axis: int,
    cap: float,
) -> ProxySettings:
    kind: GridKind = grid  # type: ignore[assignment]  # operators know no literals; Grid checks it
    return ProxySettings(Grid(kind, shift), low, high, tuple(choices), stochastic, channel_axis, cap)


@_proxy.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:  # noqa: ANN401 -- the signature of the operator
    return torch.empty_like(x)


@_proxy_backward.register_fake
def _(_grad: Tensor, y: Tensor, alpha_raw: Tensor, _key: Tensor, bit_raw: Tensor | None, *_rest: Any) -> Any:  # noqa: ANN401
    d_bits = alpha_raw.new_empty(0) if bit_raw is None else torch.empty_like(bit_raw)
    return torch.empty_like(y), torch.empty_like(alpha_raw), d_bits


def _proxy_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 -- torch has no type for it
    _x, *tensors = inputs[:8]
    ctx.save_for_backward(output, *tensors)
    ctx.settings = inputs[8:]


def _proxy_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
    y, *tensors = ctx.saved_tensors
    dx, d_alpha, d_bits = _proxy_backward(grad, y, *tensors, *ctx.settings)
    return dx, d_alpha, None, None if tensors[2] is None else d_bits, *([None] * 12)


_proxy.register_autograd(_proxy_gradients, setup_context=_proxy_context)


def proxy_operator(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The fused noise proxy as one operator for ``torch.compile``.

    Args:
        x: dense.
        tensors: parameters and key.
        settings: grid and range of bits.

    Returns:
        The proxy, shape, type and layout of x.
    """
    out: Tensor = _proxy(
        x, tensors.alpha_raw, tensors.key, tensors.bit_raw, tensors.bits_frozen, tensors.bits, tensors.table,
        tensors.table_count, settings.grid.kind, settings.grid.shift, settings.low, settings.high,
        list(settings.choices), settings.stochastic, settings.channel_axis, settings.cap,
    )  # fmt: skip
    return out


@torch.library.custom_op("nipq::quantize", mutates_args=())
def _quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: str, shift: float, channel_axis: int, cap: float) -> Tensor:
    kind: GridKind = grid  # type: ignore[assignment]  # as above
    return _kernels(x, alpha, channel_axis).round_forward(x, alpha, bits, Grid(kind, shift), channel_axis, cap)


@torch.library.custom_op("nipq::quantize_backward", mutates_args=())
def _quantize_backward(
    upstream: Tensor, x: Tensor, alpha: Tensor, bits: Tensor, grid: str, shift: float, channel_axis: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    kind: GridKind = grid  # type: ignore[assignment]  # as above
    kernels = _kernels(x, alpha, channel_axis)
    return kernels.round_backward(upstream, x, alpha, bits, Grid(kind, shift), channel_axis, cap)


@_quantize.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:  # noqa: ANN401 -- the signature of the operator
    return torch.empty_like(x)


@_quantize_backward.register_fake
def _(_upstream: Tensor, x: Tensor, alpha: Tensor, bits: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(bits)


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 -- torch's form
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _quantize_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
    return *_quantize_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_quantize.register_autograd(_quantize_gradients, setup_context=_quantize_context)


def quantize_operator(
    x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float = math.inf
) -> Tensor:
    """The fused true quantizer as one operator for ``torch.compile``.

    Args:
        x: dense.
        alpha: clipping ranges, C numbers.
        bits: whole bit-width, shape (1,).
        grid: which levels.
        channel_axis: axis of the clipping ranges.
        cap: what x is cut to before.

    Returns:
        Values on the grid, shape, type and layout of x.
    """
    out: Tensor = _quantize(x, alpha, bits, grid.kind, grid.shift, channel_axis, cap)
    return out


# ---------------------------------------------------------------------- the noise proxy


def noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The noise proxy of a tensor, from the parameters of its quantizer: fused where there is a kernel for it.

    Args:
        x: any shape, floating point; half precision is computed in float32 and rounded once.
        tensors: parameters and key.
        settings: grid, range of bits, and noise.

    Returns:
        The proxy, shape and type of x.
    """
    kernels = None
    if settings.is_fused and tensors.error_share is None:
        kernels = backend(x, tensors.alpha_raw, settings.channel_axis)
    if kernels is None:
        return plain_noise_proxy(x, tensors, settings)
    if settings.noise == "empirical" and tensors.table is None:
        tensors = _with_error_table(x.detach(), tensors, settings)
    return fused_noise_proxy(x, tensors, settings, kernels)


@torch.no_grad()
def _with_error_table(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> ProxyTensors:
    """The arguments with a table of the tensor's rounding errors at the bit-width that is drawn for it."""
    alpha, bits = _alpha_and_bits(x, tensors, settings)
    table = error_table(x, alpha, bits, settings.grid, cap=settings.cap)
    return replace(tensors, bits=bits, table=table.errors, table_count=table.inside)


def plain_noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The noise proxy in plain operations, for any type, device and setting.

    Args:
        x: any shape, floating point.
        tensors: parameters and key.
        settings: grid, range of bits, and noise.

    Returns:
        The proxy, shape and type of x.
    """
    alpha, bits = _alpha_and_bits(x, tensors, settings)
    wide = _capped(x, settings.cap)
    seen, fixed = wide.detach(), (alpha.detach(), bits.detach(), settings.grid)
    if tensors.table is None or tensors.table_count is None:
        noise = draw_noise(settings.noise, seen, *fixed, tensors.key)
    else:
        noise = table_noise(seen, ErrorTable(tensors.table, tensors.table_count), tensors.key)
    if tensors.error_share is not None:
        noise = mixed_noise(noise, true_error(seen, *fixed), tensors.error_share)
    out = proxy.noise_proxy(
        wide, alpha, bits, noise, settings.grid,
        clip_after_noise=settings.clip_after_noise, correct_range=settings.range_correction,
    )  # fmt: skip
    return out.to(x.dtype)


def _capped(x: Tensor, cap: float) -> Tensor:
    """The tensor cut at the upper end of a ReLU6 that was left out, never in half precision."""
    return widened(x if cap == math.inf else torch.where(x < cap, x, cap))


def _alpha_and_bits(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> tuple[Tensor, Tensor]:
    """Clipping range, broadcastable to x, and the bit-width that is drawn, both differentiable in their parameters."""
    alpha_raw = widened(tensors.alpha_raw)
    alpha = spread_along(alpha_from_raw(alpha_raw), settings.channel_axis, x.ndim)
    if tensors.bits_frozen is not None:
        return alpha, tensors.bits_frozen.to(alpha_raw.dtype)
    assert tensors.bit_raw is not None
    soft = bits_from_raw(widened(tensors.bit_raw), settings.low, settings.high)
    if tensors.bits is not None:
        return alpha, tensors.bits + (soft - soft.detach())
    if settings.stochastic:
        return alpha, stochastic_round_bits(soft, settings.choices, unit_draw(tensors.key))
    return alpha, round_bits(soft, settings.choices)


def fused_noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings, kernels: Backend) -> Tensor:
    """The noise proxy in one kernel with everything before it: softplus, sigmoid, the drawn bit-width, noise.

    The same numbers as ``noise_proxy(x, alpha_from_raw(alpha_raw), bits, counter_noise(x, key), grid)`` with bits
    from ``bits_from_raw`` and ``stochastic_round_bits(..., unit_draw(key))``: in float32 to the bit, but for an
    in-range result that falls exactly on an end of the range. That one is moved inward by one number of its type, for
    backward tells truncated elements by their value: it has the result alone, draws the noise again, and finds with it

        d alpha = (sum of grad noise in range) / n + (sum of grad above) - (sum of grad below, on a signed grid)
        d bits  = (sum of grad noise in range) d step / d bits

    Half-precision tensors are computed in float32 and rounded once.

    Paper: the noise proxy of section 5; design of the kernel in docs/internals/kernels.md.

    Args:
        x: any shape.
        tensors: parameters and key.
        settings: grid and range of bits.
        kernels: as :func:`backend` finds them for x.

    Returns:
        The proxy, shape and type of x.
    """
    x = x if is_dense(x) else x.contiguous()
    if torch.compiler.is_compiling():
        return proxy_operator(x, tensors, settings)
    out: Tensor = _FusedProxy.apply(x, tensors.alpha_raw, tensors.bit_raw, tensors, settings, kernels)
    return out


class _FusedProxy(torch.autograd.Function):
    """Autograd function of ``fused_noise_proxy``; saves its result only, which the layer behind saves anyway."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- torch documents no type for it
        x: Tensor,
        alpha_raw: Tensor,
        bit_raw: Tensor | None,
        tensors: ProxyTensors,
        settings: ProxySettings,
        kernels: Backend,
    ) -> Tensor:
        """The noisy tensor. The parameters stand here so that autograd sees them; the kernel takes ``tensors``."""
        y = kernels.proxy_forward(x, tensors, settings)
        # Saved one by one, so that autograd notices a parameter that was changed before backward.
        ctx.save_for_backward(y, alpha_raw, bit_raw)
        ctx.tensors, ctx.settings, ctx.kernels = tensors, settings, kernels
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
        """The gradient of x, and the sums for the parameters."""
        y, *_ = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: let autograd see how it is made
            return *_differentiable_backward(grad, y, ctx.tensors, ctx.settings), None, None, None
        return *ctx.kernels.proxy_backward(grad, y, ctx.tensors, ctx.settings), None, None, None


def _differentiable_backward(
    grad: Tensor, y: Tensor, tensors: ProxyTensors, settings: ProxySettings
) -> tuple[Tensor | None, ...]:
    """The same gradients by plain operations, on a stand-in for x that is truncated where x was."""
    with torch.no_grad():
        uncapped = replace(settings, cap=math.inf)
        lower, upper, cap = (
            plain_noise_proxy(torch.full_like(y, end), tensors, uncapped)
            for end in (-math.inf, math.inf, min(settings.cap, torch.finfo(y.dtype).max))
        )
        inside = (lower + upper.clamp(max=settings.cap)) / 2
        stand_in = torch.where(y == cap, settings.cap, inside)
        stand_in = torch.where(y == lower, -math.inf, torch.where(y == upper, math.inf, stand_in))
    stand_in.requires_grad_()
    inputs = [part for part in (stand_in, tensors.alpha_raw, tensors.bit_raw) if part is not None]
    out = plain_noise_proxy(stand_in, tensors, settings)
    found = torch.autograd.grad(out, inputs, grad, create_graph=True)
    return *found, *([None] * (3 - len(inputs)))


# ---------------------------------------------------------------------- the true quantizer


def quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, cap: float = math.inf) -> Tensor:
    """The true quantizer with straight-through gradients: fused where there is a kernel for it.

    The numbers are those of ``nipq.functional.uniform.quantize``. Half-precision tensors are computed in float32 and
    rounded once.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, shape (1,), or with the axes of x and one longer than 1.
        bits: bit-width, >= 2, shape (1,).
        grid: which levels.
        cap: upper end of a ReLU6 in front that was left out: x is cut there, and passes no gradient above.

    Returns:
        Values on the grid, shape and type of x.
    """
    axis = next((axis for axis, length in enumerate(alpha.shape) if length > 1), 0)
    kernels = backend(x, alpha, axis) if grid.kind in GRID_NUMBERS else None
    if kernels is None:
        return uniform.quantize(_capped(x, cap), alpha, bits, grid).to(x.dtype)
    x = x if is_dense(x) else x.contiguous()
    if torch.compiler.is_compiling():
        return quantize_operator(x, alpha, bits, grid, axis, cap)
    out: Tensor = _FusedStraightThrough.apply(x, alpha, bits, grid, axis, cap, kernels)
    return out


class _FusedStraightThrough(torch.autograd.Function):
    """``nipq.functional.uniform.quantize`` in one node. Saves x for backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- torch documents no type for it
        x: Tensor,
        alpha: Tensor,
        bits: Tensor,
        grid: Grid,
        channel_axis: int,
        cap: float,
        kernels: Backend,
    ) -> Tensor:
        """Values of the levels nearest to x."""
        ctx.save_for_backward(x, alpha, bits)
        ctx.settings, ctx.kernels = (grid, channel_axis, cap), kernels
        return kernels.round_forward(x, alpha, bits, grid, channel_axis, cap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
        """The gradient of x, and the sums for alpha and bits."""
        x, alpha, bits = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: let autograd see how it is made
            grid, _, cap = ctx.settings
            out = uniform.quantize(torch.where(x < cap, x, cap), alpha, bits, grid)
            inputs = [part for part, needed in zip((x, alpha, bits), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None
        return *ctx.kernels.round_backward(grad, x, alpha, bits, *ctx.settings), None, None, None, None
