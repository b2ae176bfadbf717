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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from nipq.budget.distance import float_outputs, output_distance
from nipq.distributed import all_or_none, gather_objects, inner, rank_seed, reduce_mean_
from nipq.errors import ConfigError, DistributedError, NipqError, NonFiniteError, OrderError, first_line
from nipq.functional.noise import uniform_noise
from nipq.functional.proxy import noise_proxy
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import BatchReader, Inputs, evaluating, to_device
from nipq.prepare.input_form import described

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
    inputs: Inputs | None = None,
) -> dict[str, float]:
    """Loss that the noise of each tensor adds at its present bits, -E[dL / db] / (2 ln 2), by the tensor's name.

    A mean below its own standard error over batches counts as the standard error, and the only batch's as its size, so
    none is 0 or negative. Modes,
    phases, weights and batch-norm statistics stay as they are.

    Args:
        model: a prepared and calibrated model.
        quantizers: those to measure; all of them are noisy at once, which changes no expectation to second order.
        loader: batches; with ``loss_fn`` also targets, see :class:`nipq.prepare.batches.BatchReader`.
        loss_fn: of outputs and targets; if left out, :func:`nipq.budget.distance.output_distance` from the outputs of
            the float network.
        batches: how many batches to read, at least 1; two forwards and backwards each, and a float forward if
            ``loss_fn`` is left out.
        seed: of the noise.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        Losses, in units of ``loss_fn``.

    Raises:
        OrderError: if a clipping range was never calibrated.
        ConfigError: if the loader is empty, a batch is not what the model takes, ``loss_fn`` finds no targets, fails,
            or returns no scalar.
        NonFiniteError: if a gradient is not finite.
        DistributedError: if ranks read different numbers of batches, or one of them failed.
    """
    found: list[list[float]] = []
    reader = BatchReader(model, inputs, "allocate_bits_")
    # Batch norms evaluate, so that their statistics stay.
    with evaluating(model), torch.enable_grad(), all_or_none("allocate_bits_"):
        for where, batch in reader.read(loader, batches):
            key = rank_seed(seed + len(found))
            found.append(_slopes(inner(model), quantizers, batch, loss_fn, key, reader, where))
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


@torch.enable_grad()
def _slopes(
    model: nn.Module,
    quantizers: list[TensorQuantizer],
    batch: Any,  # noqa: ANN401 -- whatever a loader yields
    loss_fn: LossFn | None,
    seed: int,
    reader: BatchReader,
    where: str,
) -> list[float]:
    """Slope of the loss in each quantizer's bits on one batch, summed over noise of both signs."""
    device = next(model.parameters()).device
    inputs = to_device(reader.inputs(batch, where), device)
    targets = to_device(reader.targets(batch, where), device) if loss_fn is not None else float_outputs(model, inputs)
    totals = [0.0] * len(quantizers)
    for sign in (1.0, -1.0):
        with _probed(quantizers, sign, seed) as bits:
            outputs = reader.call(model, inputs, where)
            loss = output_distance(outputs, targets) if loss_fn is None else loss_of(loss_fn, outputs, targets, where)
            slopes = torch.autograd.grad(loss, list(bits.values()), materialize_grads=True)
        totals = [total + float(slope) for total, slope in zip(totals, slopes, strict=True)]
    return totals


def loss_of(loss_fn: LossFn, outputs: Any, targets: Any, where: str = "loss_fn") -> Tensor:  # noqa: ANN401
    """The loss of a batch, a finite scalar that gradients flow from; errors of the function tell the batch.

    Args:
        loss_fn: of outputs and targets.
        outputs: what the model returned.
        targets: see :class:`nipq.prepare.batches.BatchReader`.
        where: name of the batch for messages.

    Raises:
        ConfigError: if the function fails, as on labels out of range, or returns no scalar.
        NonFiniteError: if the loss is not finite.
    """
    try:
        loss = loss_fn(outputs, targets)
    except (NipqError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        whole = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel()
        values = f" with values from {int(targets.min())} to {int(targets.max())}" if whole else ""
        raise ConfigError(
            f"{where}: loss_fn: expected a function of the model's outputs ({described(outputs)}) and the targets "
            f"({described(targets)}{values}), found that it fails on them: {first_line(error)}. "
            "Try loss_fn(model(x), y) on a batch of the loader."
        ) from error
    check_scalar(loss)
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"{where}: loss_fn: expected a finite loss, found {float(loss.detach())}. Look at inputs and targets."
        )
    return loss


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
