"""Which kernels serve a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import nipq.kernels.cpu as cpu
import nipq.kernels.triton_proxy as triton_proxy
import nipq.kernels.triton_rounding as triton_rounding


class Backend(NamedTuple):
    """The four kernels for one kind of device; see ``nipq.kernels.cpu`` for what each takes and returns."""

    supported: Callable[[Tensor, Tensor, int], bool]
    proxy_forward: Callable[..., Tensor]
    proxy_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    round_forward: Callable[..., Tensor]
    round_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_CPU = Backend(cpu.supported, cpu.proxy_forward, cpu.proxy_backward, cpu.round_forward, cpu.round_backward)
_CUDA = Backend(
    triton_proxy.supported,
    triton_proxy.proxy_forward,
    triton_proxy.proxy_backward,
    triton_rounding.round_forward,
    triton_rounding.round_backward,
)


def backend(x: Tensor, alpha: Tensor, channel_axis: int) -> Backend | None:
    """The kernels for a tensor, or None where plain operations have to do.

    Args:
        x: what is to be quantized.
        alpha: its boundary, or the parameter of it.
        channel_axis: axis of the boundaries where there are several.
    """
    if x.is_cuda and torch.compiler.is_compiling():
        return None  # there the compiler fuses the plain operations into what makes x
    kernels = _CUDA if x.is_cuda else _CPU
    return kernels if kernels.supported(x, alpha, channel_axis) else None
