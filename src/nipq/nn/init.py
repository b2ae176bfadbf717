"""First clipping ranges and grids, from a weight or from a sample of an input."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nipq.errors import NonFiniteError
from nipq.functional.baselines import lsq_range
from nipq.functional.clipping import LEAST_RANGE, max_range, noise_optimal_range
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.functional.uniform import quantize
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer, WeightQuantizer

logger = logging.getLogger(__name__)

#: Minus the minimum of h-swish (exact), of SiLU and of GELU, rounded up: the shifts that make such inputs unsigned.
SHIFTS = {"hardswish": 0.375, "silu": 0.2785, "gelu": 0.1701}


def start_weight_range_(quantizer: WeightQuantizer, weight: Tensor) -> None:
    """Set a weight's first clipping range, in the way that ``quantizer.init`` says.

    ``"max"``: the largest absolute weight. ``"mse"``: the range that minimises the proxy's error at the present
    bit-width (T6 in ``docs/internals/paper-map.md``). ``"lsq"``: 2 E|w| sqrt(n). ``"release"``: ``alpha_raw = max w``
    as published, softplus not inverted (Q5 there).

    Args:
        quantizer: quantizer of the weight.
        weight: the float weight.
    """
    weight = weight.detach()
    if float(weight.abs().max()) < LEAST_RANGE:
        logger.warning(
            "%s: every weight is 0, so its clipping range cannot be told and is 1; train it in floats first, or "
            "leave the layer float by a rule",
            quantizer.name,
        )
    if quantizer.init == "release":
        _set_raw_(quantizer, float(weight.max()))
        return
    quantizer.set_alpha_(_range(quantizer, weight, quantizer.grid, quantizer.range_axis))


def start_input_range_(quantizer: InputQuantizer, sample: Tensor) -> None:
    """Choose an input's grid, unless a rule did, and set its first clipping range from a sample.

    The grid is unsigned when the sample has no negative value. Otherwise it is the better, by squared error at the
    present bit-width, of the signed grid and the shifted grid whose shift is the smallest known one that covers the
    sample's minimum (h-swish, SiLU, GELU). A learned offset starts at the sample's minimum. The range minimises the
    squared error (``init="mse"``), covers the sample (``"max"``), is LSQ's start (``"lsq"``), or is the published
    constant (``"release"``: raw 6, and raw 3 when signed).

    Args:
        quantizer: quantizer of the input.
        sample: values of the input, any shape, at least one.

    Raises:
        NonFiniteError: if the sample holds NaN or infinity.
    """
    if not bool(torch.isfinite(sample).all()):
        raise NonFiniteError(
            f"{quantizer.name}: expected finite activations while calibrating, found NaN or infinity. "
            "Check the float model and its inputs."
        )
    sample = sample.flatten().float()
    if float(sample.abs().max()) < LEAST_RANGE:
        logger.warning(
            "%s: every calibration sample is 0, so its clipping range cannot be told and is 1; if it is not dead, "
            "calibrate on other data",
            quantizer.name,
        )
    bits = float(quantizer.bits_rounded)
    starts = [(grid, _range(quantizer, sample, grid)) for grid in _candidate_grids(quantizer, sample)]
    errors = [float((quantize(sample, alpha, bits, grid) - sample).square().mean()) for grid, alpha in starts]
    quantizer.grid, alpha = starts[errors.index(min(errors))]
    if quantizer.init == "release":
        _set_raw_(quantizer, 3.0 if quantizer.grid.kind == "signed" else 6.0)
    else:
        quantizer.set_alpha_(alpha)


@torch.no_grad()
def _set_raw_(quantizer: TensorQuantizer, raw: float) -> None:
    quantizer.alpha_raw.fill_(raw)
    quantizer.calibrated = True


def _range(quantizer: TensorQuantizer, x: Tensor, grid: Grid, channel_axis: int | None = None) -> Tensor:
    if quantizer.init == "max":
        alpha = max_range(x, grid, channel_axis=channel_axis)
    elif quantizer.init == "lsq":
        alpha = lsq_range(x, float(quantizer.bits_rounded), grid, channel_axis=channel_axis)
    else:
        alpha = noise_optimal_range(x, float(quantizer.bits_rounded), grid, channel_axis=channel_axis)
    return torch.where(alpha >= LEAST_RANGE, alpha, 1)  # of data that are 0 but for rounding none can be told


def _candidate_grids(quantizer: InputQuantizer, sample: Tensor) -> list[Grid]:
    lowest, choice = max(0.0, -float(sample.min())), quantizer.grid_choice
    if quantizer.estimator.learns_offset:
        return [Grid("shifted", lowest)]
    # 2 % of slack: half-precision activations and approximate GELUs dip a little below the exact minimum.
    covering = [shift for shift in sorted(SHIFTS.values()) if lowest <= 1.02 * shift]
    if choice == "shifted":
        return [Grid("shifted", covering[0] if covering else lowest)]
    if choice == "auto":
        if lowest == 0:
            return [UNSIGNED]
        return [SIGNED, *(Grid("shifted", shift) for shift in covering[:1])]
    return [Grid("signed" if choice == "signed" else "unsigned")]
