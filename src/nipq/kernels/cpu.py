"""C++ kernels for CPUs, called through ctypes: the functions take and return tensors, the library gets addresses.

:mod:`nipq.kernels.build` compiles and loads them; where it cannot, plain operations do.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nipq.functional.counter_rng import is_dense
from nipq.functional.grid import Grid
from nipq.kernels.arguments import GRID_NUMBERS, ProxySettings, ProxyTensors, laid_out_like
from nipq.kernels.build import SWITCH, available, library

__all__ = [
    "SWITCH", "available", "library", "proxy_backward", "proxy_forward", "round_backward", "round_forward", "supported",
]  # fmt: skip

#: Elements that one thread takes at a time, and that share a partial sum; a few pages of memory.
SHARE = 1 << 15

#: Fewest neighbours in memory that share a clipping range; below it the kernel would not be the faster way.
LEAST_RUN = 16

#: Numbers of the element types in compiled code.
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Call(ctypes.Structure):
    """Arguments of one call, ``struct Call`` of source/call.hpp field by field."""

    _fields_ = (
        ("elements", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("alpha", ctypes.c_void_p),
        ("alpha_raw", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("bits_frozen", ctypes.c_void_p),
        ("bit_raw", ctypes.c_void_p),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("choices", ctypes.c_uint32),
        ("stochastic", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("shift", ctypes.c_double),
        ("cap", ctypes.c_double),
        ("key", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_count", ctypes.c_void_p),
        ("bfloat16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def supported(x: Tensor, alpha: Tensor, channel_axis: int) -> bool:
    """Return whether there is a kernel for such a tensor.

    Args:
        x: what is to be quantized.
        alpha: its clipping range, or the parameter of it.
        channel_axis: axis of the clipping ranges.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and alpha.dtype == torch.float32
        and available()
        and (alpha.numel() == 1 or (is_dense(x) and x.stride(channel_axis) >= LEAST_RUN))
    )


def proxy_forward(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Tensor:
    """The noise proxy of ``nipq.functional.proxy``.

    Args:
        x: dense, float32 or bfloat16.
        tensors: clipping range, bits and key.
        settings: grid and range of bits.

    Returns:
        The proxy, shape, type and layout of x.
    """
    y = torch.empty_like(x)
    call = _proxy_call(x, tensors, settings)
    _library().nipq_proxy_forward(ctypes.byref(call), x.data_ptr(), y.data_ptr())
    return y


def proxy_backward(
    grad: Tensor, y: Tensor, tensors: ProxyTensors, settings: ProxySettings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`proxy_forward`, from its result.

    Args:
        grad: incoming gradient, shape of y.
        y: what it returned.
        tensors: as given to it.
        settings: as given to it.

    Returns:
        The gradients of x, of alpha_raw, and of bit_raw where there is one.
    """
    grad = laid_out_like(grad, y)
    dx, d_alpha_raw = torch.empty_like(y), torch.empty_like(tensors.alpha_raw)
    d_bit_raw = None if tensors.bit_raw is None else torch.empty_like(tensors.bit_raw)
    call = _proxy_call(y, tensors, settings)
    _library().nipq_proxy_backward(
        ctypes.byref(call), grad.data_ptr(), y.data_ptr(), dx.data_ptr(), d_alpha_raw.data_ptr(), _address(d_bit_raw)
    )
    return dx, d_alpha_raw, d_bit_raw


def round_forward(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float) -> Tensor:
    """The true quantizer of ``nipq.functional.uniform``.

    Args:
        x: dense, float32 or bfloat16.
        alpha: clipping ranges, float32, C numbers.
        bits: whole bit-width, float32, shape (1,).
        grid: which levels.
        channel_axis: axis of the clipping ranges.
        cap: what x is cut to before, infinity for nothing.

    Returns:
        Values on the grid, shape, type and layout of x.
    """
    y = torch.empty_like(x)
    call = _round_call(x, alpha, bits, grid, channel_axis, cap)
    _library().nipq_round_forward(ctypes.byref(call), x.data_ptr(), y.data_ptr())
    return y


def round_backward(
    grad: Tensor, x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`round_forward`.

    Args:
        grad: incoming gradient, shape of x.
        x: as given to it.
        alpha: as given to it.
        bits: as given to it.
        grid: as given to it.
        channel_axis: as given to it.
        cap: as given to it.

    Returns:
        The gradients of x, alpha and bits.
    """
    grad = laid_out_like(grad, x)
    dx, d_alpha, d_bits = torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(bits)
    call = _round_call(x, alpha, bits, grid, channel_axis, cap)
    _library().nipq_round_backward(
        ctypes.byref(call), grad.data_ptr(), x.data_ptr(), dx.data_ptr(), d_alpha.data_ptr(), d_bits.data_ptr()
    )
    return dx, d_alpha, d_bits


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None  # ``supported`` was asked
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(x: Tensor, channels: int, channel_axis: int) -> Call:
    length = SHARE if channels == 1 else x.stride(channel_axis)
    return Call(
        elements=x.numel(), length=length, channels=channels, bfloat16=_TYPES[x.dtype], threads=torch.get_num_threads()
    )


def _proxy_call(x: Tensor, tensors: ProxyTensors, settings: ProxySettings) -> Call:
    call = _call(x, tensors.alpha_raw.numel(), settings.channel_axis)
    call.alpha_raw, call.key = tensors.alpha_raw.data_ptr(), tensors.key.data_ptr()
    call.bit_raw, call.bits_frozen = _address(tensors.bit_raw), _address(tensors.bits_frozen)
    call.bits, call.table, call.table_count = (
        _address(tensors.bits), _address(tensors.table), _address(tensors.table_count)
    )  # fmt: skip
    call.low, call.high, call.cap = settings.low, settings.high, settings.cap
    call.grid, call.shift, call.stochastic = GRID_NUMBERS[settings.grid.kind], settings.grid.shift, settings.stochastic
    call.choices = sum(1 << bits for bits in settings.choices)
    return call


def _round_call(x: Tensor, alpha: Tensor, bits: Tensor, grid: Grid, channel_axis: int, cap: float) -> Call:
    call = _call(x, alpha.numel(), channel_axis)
    call.alpha, call.bits = alpha.data_ptr(), bits.data_ptr()
    call.grid, call.shift, call.cap = GRID_NUMBERS[grid.kind], grid.shift, cap
    return call
