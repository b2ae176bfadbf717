"""The fused true quantizer: one pass for evaluation and fine-tuning with rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import nipq.functional.uniform as uniform
import nipq.kernels.operators as operators
from nipq.functional.counter_rng import is_dense
from nipq.functional.grid import Grid
from nipq.kernels.backend import Backend, backend


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
