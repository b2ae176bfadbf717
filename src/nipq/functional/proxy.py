"""The noise proxy: pseudo-quantization noise in training, in place of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nipq.functional.grid import Grid, code_range, step_size, value_range
from nipq.functional.uniform import inside_range, integer_codes, truncate, truncation_gradients

#: Variance of noise drawn uniformly from one step, in units of the step squared.
UNIFORM_VARIANCE = 1 / 12


class _NoiseInside(torch.autograd.Function):
    """Autograd function of ``noise_proxy``: truncation, plus noise * step strictly inside.

    Plain operations under autograd give the same, at three times the time and memory. Keeps x and the noise.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- torch documents no type for it
        x: Tensor,
        step: Tensor,
        lower: Tensor,
        upper: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Noise inside the range, the nearer end outside."""
        ctx.save_for_backward(x, step, lower, upper, noise)
        # No addcmul: it rounds once where the processor can, so that a result would depend on the processor.
        return truncate(x, lower, upper).add_(inside_range(x, lower, upper).mul_(noise).mul_(step))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- as above
        """The shared gradient, with the noise for slope."""
        x, step, lower, upper, noise = ctx.saved_tensors
        return *truncation_gradients(grad, x, noise, (lower, upper), step, ctx.needs_input_grad), None


def noise_proxy(
    x: Tensor,
    alpha: Tensor,
    bits: Tensor | float,
    noise: Tensor,
    grid: Grid,
    *,
    clip_after_noise: bool = False,
    correct_range: bool = False,
) -> Tensor:
    r"""The proxy of the quantizer: noise of one step inside the range, the nearer end of the range outside.

    Qhat = x + noise * step strictly inside the range, alpha where x >= alpha, and at the other end -alpha (signed) or
    exactly 0 (unsigned). It shares alpha and bits with ``quantize``, so the two can be swapped at any moment. The
    result may pass an end of the range by half a step, as in the published code, unless ``clip_after_noise``.
    Gradients::

        region                     d/dx    d/d alpha    d/d bits
        in range                   1       noise / n    noise * d step / d bits
        x >= alpha                 0       1            0
        x <= -alpha (signed)       0       -1           0
        x <= 0 (unsigned)          0       0            0
        x is not a number          0       0            0

    which is ``quantize`` with the noise in place of the error e: the content of the paper's section 5.2.

    **The range correction.** LSQ's gradient, and with it the proxy's, is not the derivative of the actual error. The
    level that x is rounded to is code * alpha / n, so it moves with alpha as Q / alpha, and for the loss
    (Q - x)^2 an in-range element contributes 2 (Q - x) Q / alpha; LSQ has 2 (Q - x) (Q - x) / alpha. What is missing
    is 2 (Q - x) x / alpha. A term of value zero, coefficient * (alpha - alpha.detach()), can carry it into any loss.
    Its coefficient multiplies the incoming gradient g; to turn that into the curvature h, which is 2 above, let g
    meet the noise it responds to: to first order g = g0 + h * step * noise, so E[g * noise] = h * step * var(noise)
    as noise has mean 0. With::

        coefficient = noise * (Q(x) - x) * x / (alpha * step * var(noise))      in range, else 0

    the gradient of alpha grows by E[g * coefficient] = h (Q(x) - x) x / alpha, for h = 2 exactly what was missing.
    The variance is taken as 1/12, that of uniform noise.

    Paper: the noise proxy of section 5; T4b in docs/internals/paper-map.md. The correction is not in it.

    Args:
        x: any shape, floating point.
        alpha: clipping range, units of x, > 0, broadcastable to x.
        bits: bit-width, >= 2, whole or fractional, broadcastable to alpha.
        noise: units of the step, in [-1/2, 1/2], shape of x; gets no gradient.
        grid: which levels.
        clip_after_noise: keep the result inside the range. It biases the mean near the ends.
        correct_range: add the range correction to the gradient of alpha; the value stays the same.

    Returns:
        The proxy, shape and type of x.

    Raises:
        ConfigError: if any bit-width is below 2.

    Example:
        >>> from nipq.functional.grid import SIGNED
        >>> x, noise = torch.tensor([-9.0, 0.2, 9.0]), torch.tensor([0.5, 0.25, 0.5])
        >>> noise_proxy(x, torch.tensor([3.0]), torch.tensor([3.0]), noise, SIGNED)
        tensor([-3.0000,  0.4500,  3.0000])
    """
    step = step_size(alpha, bits, grid)
    lower, upper = value_range(alpha, bits, grid)
    out: Tensor = _NoiseInside.apply(x, step, lower, upper, noise)
    if clip_after_noise:  # truncate once more: what noise carried over an end now belongs to that end
        out = _NoiseInside.apply(out, step, lower, upper, torch.zeros_like(noise))
    if correct_range:
        out = out + _correction(x, alpha, bits, noise, grid) * (alpha - alpha.detach())
    return out.to(x.dtype)


@torch.no_grad()
def _correction(x: Tensor, alpha: Tensor, bits: Tensor | float, noise: Tensor, grid: Grid) -> Tensor:
    """Coefficient of the range correction; (Q - x) / step is the error in units of the step."""
    step = step_size(alpha, bits, grid)
    lower, upper = value_range(alpha, bits, grid)
    error = integer_codes(x, step, *code_range(alpha, bits, grid), level_offset=grid.level_offset) - x / step
    coefficient = noise * error * x / (alpha * UNIFORM_VARIANCE)
    return inside_range(x, lower, upper) * coefficient
