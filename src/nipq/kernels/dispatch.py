"""Which kernels serve a tensor.

The kernels as operators that ``torch.compile`` keeps whole, with their gradients.

Eager code calls the kernels directly, which costs a third of what an operator written in Python costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nipq.functional.grid import Grid, GridKind
from nipq.kernels import cpu
from nipq.kernels.arguments import ProxySettings, ProxyTensors


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
        alpha: its boundary, or the parameter of it.
        channel_axis: axis of the boundaries where there are several.
    """
    if x.is_cuda and torch.compiler.is_compiling():
        return None  # there the compiler fuses the plain operations into what makes x
    kernels = _cuda() if x.is_cuda else _CPU
    return kernels if kernels.supported(x, alpha, channel_axis) else None


def _kernels(x: Tensor, alpha: Tensor, channel_axis: int) -> Backend:
    found = backend(x, alpha, channel_axis)
    assert found is not None  # asked when the graph was made
    return found


# ---------------------------------------------------------------------- the noise proxy


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


def proxy(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """``nipq.kernels.fused.fused_noise_proxy`` as one operator.

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


# ---------------------------------------------------------------------- the true quantizer


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


def quantize(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float = math.inf) -> Tensor:
    """``nipq.kernels.fused.quantize`` as one operator.

    Args:
        x: dense.
        alpha: boundaries, C numbers.
        bits: whole bit-width, shape (1,).
        grid: which levels.
        channel_axis: axis of the boundaries.
        cap: what x is cut to before.

    Returns:
        Values on the grid, shape, type and layout of x.
    """
    out: Tensor = _quantize(x, alpha, bits, grid.kind, grid.shift, channel_axis, cap)
    return out
