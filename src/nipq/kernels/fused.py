"""The fused noise proxy: from the parameters of a quantizer to the noisy tensor in one pass, and back in one.

The fused true quantizer: one pass for evaluation and fine-tuning with rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nipq.functional import uniform
from nipq.functional.bitwidth import bits_from_raw, round_bits, stochastic_round_bits
from nipq.functional.clipping import alpha_from_raw
from nipq.functional.counter_rng import counter_noise, is_dense, unit_draw
from nipq.functional.grid import Grid
from nipq.functional.noise import ErrorTable, table_noise
from nipq.functional.proxy import noise_proxy
from nipq.functional.uniform import widened
from nipq.kernels import dispatch as operators
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.dispatch import Backend, backend


class _FusedProxy(torch.autograd.Function):
    """See ``fused_noise_proxy``. Keeps its result, which the layer behind it keeps anyway, and nothing else."""

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


def plain_noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """What ``fused_noise_proxy`` stands for, in plain operations, for any type and device.

    Args:
        x: any shape, floating point.
        tensors: parameters and key.
        settings: grid and range of bits.

    Returns:
        The proxy, shape and type of x.
    """
    alpha, bits = alpha_from_raw(tensors.alpha_raw), _whole_bits(tensors, settings)
    wide = widened(x if settings.cap == math.inf else torch.where(x < settings.cap, x, settings.cap))
    if alpha.numel() > 1:
        shape = [1] * x.ndim
        shape[settings.channel_axis] = -1
        alpha = alpha.reshape(shape)
    if tensors.table is None or tensors.table_count is None:
        noise = counter_noise(wide, tensors.key)
    else:
        noise = table_noise(wide, ErrorTable(tensors.table, tensors.table_count), tensors.key)
    return noise_proxy(wide, alpha, bits, noise, settings.grid).to(x.dtype)


def _whole_bits(tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The bit-width that was drawn, differentiable in its parameter."""
    if tensors.bits_frozen is not None:
        return tensors.bits_frozen.to(tensors.alpha_raw.dtype)
    assert tensors.bit_raw is not None
    soft = bits_from_raw(tensors.bit_raw, settings.low, settings.high)
    if tensors.bits is not None:
        return tensors.bits + (soft - soft.detach())
    if settings.stochastic:
        return stochastic_round_bits(soft, settings.choices, unit_draw(tensors.key))
    return round_bits(soft, settings.choices)


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


def fused_noise_proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings, kernels: Backend) -> Tensor:
    """The noise proxy with everything before it: softplus, sigmoid, the drawn bit-width, noise.

    The same numbers as ``noise_proxy(x, alpha_from_raw(alpha_raw), bits, counter_noise(x, key), grid)`` with bits
    from ``bits_from_raw`` and ``stochastic_round_bits(..., unit_draw(key))``: in float32 to the bit, but for an
    in-range result that falls exactly on an end of the range. That one is moved inward by one number of its type, for
    backward tells truncated elements by their value: it has the result alone, draws the noise again, and finds with it

        d alpha = (sum of grad noise in range) / n + (sum of grad above) - (sum of grad below, on a signed grid)
        d bits  = (sum of grad noise in range) d step / d bits

    Half-precision tensors are computed in float32 and rounded once.

    Paper: the noise proxy of section 5; design of the kernel in docs/speed.md.

    Args:
        x: any shape.
        tensors: parameters and key.
        settings: grid and range of bits.
        kernels: what ``nipq.kernels.dispatch.backend`` found for x.

    Returns:
        The proxy, shape and type of x.
    """
    x = x if is_dense(x) else x.contiguous()
    if torch.compiler.is_compiling():
        return operators.proxy(x, tensors, settings)
    out: Tensor = _FusedProxy.apply(x, tensors.alpha_raw, tensors.bit_raw, tensors, settings, kernels)
    return out


class _FusedStraightThrough(torch.autograd.Function):
    """``nipq.functional.uniform.quantize`` in one node. Keeps x."""

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


def quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, cap: float = math.inf) -> Tensor:
    """``nipq.functional.uniform.quantize``: the same numbers, in one pass where there is a kernel.

    Half-precision tensors are computed in float32 and rounded once.

    Args:
        x: any shape, floating point.
        alpha: boundary, units of x, > 0, shape (1,), or with the axes of x and one longer than 1.
        bits: bit-width, >= 2, shape (1,).
        grid: which levels.
        cap: what x is cut to before, with no gradient above: a ReLU6 in front that was left out.

    Returns:
        Values on the grid, shape and type of x.
    """
    axis = next((axis for axis, length in enumerate(alpha.shape) if length > 1), 0)
    kernels = backend(x, alpha, axis)
    if kernels is None:
        return uniform.quantize(uniform.widened(torch.where(x < cap, x, cap)), alpha, bits, grid).to(x.dtype)
    x = x if is_dense(x) else x.contiguous()
    if torch.compiler.is_compiling():
        return operators.quantize(x, alpha, bits, grid, axis, cap)
    out: Tensor = _FusedStraightThrough.apply(x, alpha, bits, grid, axis, cap, kernels)
    return out
