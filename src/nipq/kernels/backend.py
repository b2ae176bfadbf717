"""Which kernels serve a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import nipq.kernels.cpu as cpu


class Backend(NamedTuple):
    """The four kernels for one kind of device; see ``nipq.kernels.cpu`` for what each takes and returns."""

    supported: Callable[[Tensor, Tensor, int], bool]
    proxy_forward: Callable[..., Tensor]
    proxy_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    round_forward: Callable[..., Tensor]
    round_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_CPU = Backend(cpu.supported, cpu.proxy_forward, cpu.proxy_backward, cpu.round_forward, cpu.round_backward)


def backend(x: Tensor, alpha: Tensor, channel_axis: int) -> Backend | None:
    """The kernels for a tensor, or None where plain operations have to do.

    Args:
        x: what is to be quantized.
        alpha: its boundary, or the parameter of it.
        channel_axis: axis of the boundaries where there are several.
    """
    return next((kernels for kernels in (_CPU,) if kernels.supported(x, alpha, channel_axis)), None)
