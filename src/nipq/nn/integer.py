"""Integer-domain arithmetic, in the one form in which torch and an integer runtime agree to the bit.

Codes are whole numbers held in floats. A convolution over them is exact while its sums stay below 2^24 in float32 (2^53
in float64); rounding the sums removes what a fast algorithm such as Winograd adds below one half. After that come one
multiply and one add, in float32. Phase ``"int"`` of a prepared model and the deployed model both run this file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.errors import OrderError

#: Largest whole number up to which float32 holds every whole number.
EXACT_FLOAT32 = 2**24

#: Largest whole number up to which every reduced form of float32 holds every whole number. Kernels may round what they
#: multiply to bfloat16 (8 bits of precision), if told to, or to TF32 (11 bits), by default in convolutions on a GPU.
EXACT_REDUCED = 2**8


def bias_of(layer: nn.Module) -> Tensor | None:
    """Bias of a supported layer, or None."""
    bias = getattr(layer, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


@torch.no_grad()
def fold(
    step_x: Tensor, step_w: Tensor, bias: Tensor | None, batchnorm: nn.Module | None, channels: int
) -> tuple[Tensor, Tensor]:
    """The multiply and the add after an integer convolution, with the batch norm folded in.

    With g = gamma / sqrt(var + eps): ``scale = step_x * step_w * g`` and ``offset = (bias - mean) * g + beta``, in
    float64 and rounded once. A negative gamma gives a negative scale; the codes stay those that were trained.

    Args:
        step_x: step of the input, one element.
        step_w: step of the weight, one element or one per output channel.
        bias: bias of the layer, shape ``(channels,)``, or None.
        batchnorm: a batch norm with running statistics, or None.
        channels: output channels of the layer.

    Returns:
        ``(scale, offset)``, float32, each of shape ``(channels,)``.
    """
    scale = (step_x.double() * step_w.double()).expand(channels).clone()
    offset = torch.zeros_like(scale) if bias is None else bias.detach().double().clone()
    if batchnorm is not None:
        assert isinstance(batchnorm, _BatchNorm)
        assert batchnorm.running_mean is not None
        assert batchnorm.running_var is not None
        # Divisions and square roots are rounded alike on every device; a reciprocal square root is not.
        gain = 1 / torch.sqrt(batchnorm.running_var.double() + batchnorm.eps)
        if batchnorm.affine:
            gain = gain * batchnorm.weight.double()
        scale, offset = scale * gain, (offset - batchnorm.running_mean.double()) * gain
        if batchnorm.affine:
            offset = offset + batchnorm.bias.double()
    return scale.float(), offset.float()


@torch.no_grad()
def needs_float64(weight_codes: Tensor, low: Tensor | int, high: Tensor | int, channel_axis: int = 0) -> bool:
    """Return whether float32 might not be exact.

    A sum may pass 2^24 in the worst case when ``sum |w| per output channel * max |code| >= 2^24``, and a code above 256
    may be rounded by a float32 kernel that works in reduced precision.

    Args:
        weight_codes: whole codes of the weight.
        low: lowest input code.
        high: highest input code.
        channel_axis: axis of the weight that a sum does not run along.

    Returns:
        True when float32 is not provably exact.
    """
    axes = [axis for axis in range(weight_codes.ndim) if axis != channel_axis]
    magnitudes = weight_codes.double().abs()
    largest_code = max(abs(float(low)), abs(float(high)))
    if max(largest_code, float(magnitudes.max())) > EXACT_REDUCED:
        return True
    return float(magnitudes.sum(dim=axes).max()) * largest_code >= EXACT_FLOAT32


def integer_forward(
    run: Callable[[Tensor, Tensor], Tensor],
    codes_x: Tensor,
    codes_w: Tensor,
    scale: Tensor,
    offset: Tensor,
    dim: int,
    float64: bool,
) -> Tensor:
    """A layer on whole codes: ``round(run(codes_x, codes_w)) * scale + offset``.

    Args:
        run: the layer's own forward without bias, as a function of input and weight.
        codes_x: whole input codes relative to the zero point.
        codes_w: whole weight codes.
        scale: shape ``(channels,)``, float32.
        offset: shape ``(channels,)``, float32.
        dim: channel axis of the output, negative.
        float64: whether to sum in float64, see :func:`needs_float64`.

    Returns:
        The layer's output in float32.
    """
    wide = torch.float64 if float64 else torch.float32
    with _full_precision(scale.device.type):
        sums = torch.round(run(codes_x.to(wide), codes_w.to(wide)))
        shape = [-1] + [1] * (-dim - 1)
        return sums.float() * scale.reshape(shape) + offset.reshape(shape)


def whole_product(
    codes_x: Tensor, codes_y: Tensor, step: Tensor, low_x: float, high_x: float, low_y: float, high_y: float
) -> Tensor:
    """The product of two computed tensors on whole codes: ``round(x @ y) * step``.

    Args:
        codes_x: whole codes, shape (..., n, k).
        codes_y: whole codes, shape (..., k, m).
        step: product of both steps, one element, float32.
        low_x: lowest code of x.
        high_x: highest code of x.
        low_y: lowest code of y.
        high_y: highest code of y.

    Returns:
        Shape (..., n, m), float32.
    """
    largest_x, largest_y = max(-low_x, high_x), max(-low_y, high_y)
    exact = codes_x.shape[-1] * largest_x * largest_y < EXACT_FLOAT32 and max(largest_x, largest_y) <= EXACT_REDUCED
    wide = torch.float32 if exact else torch.float64
    with _full_precision(step.device.type):
        return torch.round(torch.matmul(codes_x.to(wide), codes_y.to(wide))).float() * step


def refuse_dropout(name: str, drop: float) -> None:
    """Products of whole codes are for evaluation.

    Args:
        name: full name of the product, for the message.
        drop: what the model asked for.

    Raises:
        OrderError: if the model asks for dropout.
    """
    if drop:
        raise OrderError(
            f"{name}: expected no dropout where attention is computed in whole codes, found a share of {drop:g}. "
            "Call model.eval(), and let the model ask for dropout in training only."
        )


def _full_precision(device: str) -> AbstractContextManager[None]:
    """Autocast off; nothing at all where it is off already, so that an exported graph holds no trace of it."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
