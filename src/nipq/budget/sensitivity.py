"""Sensitivity of the loss to the bit-width of each tensor, measured by noise of both signs.

Under noise of mean 0 the expected gradient of a bit-width measures curvature: for a loss L and a tensor x with step D::

    E[dL / db] = E[g(x + eps D) . eps] dD/db = D D' tr(H) / 12        H the Hessian of L in x

to second order. HAWQ computes the same trace by products with the Hessian. One draw of it is mostly noise: the
gradient g(x) itself, times eps. Two draws with eps and -eps on the same batch cancel that term exactly. A few batches,
with the weights left alone, give every tensor's loss l_q = -E[dL / db] / (2 ln 2) at its present bits b0; at b bits it
is l_q 4^(b0 - b).

Without labels the loss is the distance of the outputs under noise from those of the float network on the same batch.

Paper: not in it; there all bit-widths start at 8.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from nipq.budget.distance import float_outputs, output_distance
from nipq.distributed import all_or_none, gather_objects, inner, rank_seed, reduce_mean_
from nipq.errors import ConfigError, DistributedError, NonFiniteError, OrderError
from nipq.functional.noise import uniform_noise
from nipq.functional.proxy import noise_proxy
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model, evaluating, inputs_of, to_device

#: A loss of outputs and targets, a scalar.
LossFn = Callable[[Any, Any], Tensor]


def noise_losses(
    model: nn.Module,
    quantizers: list[TensorQuantizer],
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    batches: int,
    seed: int = 0,
) -> dict[str, float]:
    """Loss that the noise of each tensor adds at its present bits, -E[dL / db] / (2 ln 2), by the tensor's name.

    A mean below its own standard error over batches counts as the standard error, and the only batch's as its size, so
    none is 0 or negative. Modes,
    phases, weights and batch-norm statistics stay as they are.

    Args:
        model: a prepared and calibrated model.
        quantizers: those to measure; all of them are noisy at once, which changes no expectation to second order.
        loader: batches as :func:`nipq.prepare.batches.inputs_of` takes them; with ``loss_fn`` also targets, the second
            item of a tuple or ``labels``, ``label`` or ``target`` of a mapping.
        loss_fn: of outputs and targets; if left out, :func:`nipq.budget.distance.output_distance` from the outputs of
            the float network.
        batches: how many batches to read, at least 1; two forwards and backwards each, and a float forward if
            ``loss_fn`` is left out.
        seed: of the noise.

    Returns:
        Losses, in units of ``loss_fn``.

    Raises:
        OrderError: if a clipping range was never calibrated.
        ConfigError: if the loader is empty, ``loss_fn`` finds no targets, or it returns no scalar.
        NonFiniteError: if a gradient is not finite.
        DistributedError: if ranks read different numbers of batches, or one of them failed.
    """
    found: list[list[float]] = []
    # Batch norms evaluate, so that their statistics stay.
    with evaluating(model), torch.enable_grad(), all_or_none("allocate_bits_"):
        for number, batch in enumerate(islice(loader, batches)):
            found.append(_slopes(inner(model), quantizers, batch, loss_fn, rank_seed(seed + number)))
        if not found:
            raise ConfigError("allocate_bits_: expected batches, found an empty loader. Give one that yields some.")
    counts = gather_objects(len(found))
    if len(set(counts)) > 1:
        raise DistributedError(
            f"allocate_bits_: expected as many batches on every rank, found {counts}. Pass batches={min(counts)}."
        )
    means = torch.tensor(found, dtype=torch.float64)
    reduce_mean_([means])
    columns = (-means / (4 * math.log(2))).T.tolist()
    return {
        quantizer.name: _charge(quantizer.name, values) for quantizer, values in zip(quantizers, columns, strict=True)
    }


def _slopes(
    model: nn.Module,
    quantizers: list[TensorQuantizer],
    batch: Any,  # noqa: ANN401 -- whatever a loader yields
    loss_fn: LossFn | None,
    seed: int,
) -> list[float]:
    """Slope of the loss in each quantizer's bits on one batch, summed over noise of both signs."""
    device = next(model.parameters()).device
    inputs = to_device(inputs_of(batch), device)
    compare: LossFn = output_distance if loss_fn is None else loss_fn
    targets = float_outputs(model, inputs) if loss_fn is None else to_device(targets_of(batch), device)
    totals = [0.0] * len(quantizers)
    for sign in (1.0, -1.0):
        with _probed(quantizers, sign, seed) as bits:
            loss = compare(call_model(model, inputs), targets)
            check_scalar(loss)
            slopes = torch.autograd.grad(loss, list(bits.values()), materialize_grads=True)
        totals = [total + float(slope) for total, slope in zip(totals, slopes, strict=True)]
    return totals


def targets_of(batch: Any) -> Any:  # noqa: ANN401 -- whatever a loader yields
    """Targets in a batch: the second item of a tuple, or ``labels``, ``label`` or ``target`` of a mapping.

    Args:
        batch: what a loader yields.

    Raises:
        ConfigError: if there are none.
    """
    if isinstance(batch, Mapping):
        found = [batch[key] for key in ("labels", "label", "target") if key in batch]
    else:
        found = list(batch[1:2]) if isinstance(batch, (tuple, list)) else []
    if not found:
        raise ConfigError(
            "loss_fn: expected batches (inputs, targets), found one without targets. "
            "Give targets, or leave loss_fn out to compare with the float model's own outputs."
        )
    return found[0]


def check_scalar(loss: object) -> None:
    """Refuse what a loss function returned unless it is a scalar that gradients flow from.

    Args:
        loss: what it returned.

    Raises:
        ConfigError: if it is something else.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if isinstance(loss, Tensor) and loss.numel() == 1:
        found = "one without a gradient"
    raise ConfigError(
        f"loss_fn: expected a scalar tensor that depends on the outputs, found {found}. "
        "Return the mean of the loss over the batch, computed from the outputs by torch."
    )


def _charge(name: str, values: list[float]) -> float:
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: expected finite gradients under noise, found NaN or infinity. Check the model.")
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else abs(mean)
    return max(mean, error, 1e-12)


@contextmanager
def _probed(quantizers: list[TensorQuantizer], sign: float, seed: int) -> Iterator[dict[str, Tensor]]:
    """Let quantizers add noise of a given sign, drawn alike for either; yields a leaf for each one's bits."""
    bits = {quantizer.name: quantizer.bits.detach().clone().requires_grad_() for quantizer in quantizers}
    generator = Generator(quantizers[0].alpha_raw.device).manual_seed(seed)

    def probe(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated clipping range, found none. Call nipq.calibrate_ before."
            )
        alpha = quantizer.spread(quantizer.alpha.detach(), x.ndim)
        noise = sign * uniform_noise(x.detach(), generator)
        return noise_proxy(x, alpha, bits[quantizer.name], noise, quantizer.grid)

    try:
        for quantizer in quantizers:  # bound methods on the instance, as for phase "int"
            quantizer.forward = types.MethodType(probe, quantizer)  # type: ignore[method-assign]  # on purpose
        yield bits
    finally:
        for quantizer in quantizers:
            quantizer.__dict__.pop("forward", None)
