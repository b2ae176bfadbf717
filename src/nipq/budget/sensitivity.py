r"""Where learned bit-widths start: at the budget, shared out by what the noise proxy says about each tensor.

Under noise of mean 0 the expected gradient of a bit-width measures curvature: for a loss L and a tensor x with step D::

    E[dL / db] = E[g(x + eps D) . eps] dD/db = D D' tr(H) / 12        H the Hessian of L in x

to second order. It is what HAWQ computes by products with the Hessian, and it is there at every step, but one draw of
it is mostly noise: the gradient g(x) itself, times eps. Two draws with eps and -eps on the same batch cancel that term
exactly. So a few batches in the middle of the bit range, with the weights left alone, tell every tensor's loss
l_q = -E[dL / db] / (2 ln 2) at its present bits b0, and at b bits it is l_q 4^(b0 - b). The start is the assignment of
least summed loss within the budget, as in the snap. Learning goes on from there, at the budget from the first step.

Paper: not in it; there all bit-widths start at 8.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget, check_feasible
from nipq.budget.solver import least_loss_bits
from nipq.distributed import (
    all_or_none,
    check_same_,
    from_rank_zero,
    gather_objects,
    inner,
    rank_seed,
    reduce_mean_,
)
from nipq.errors import ConfigError, DistributedError, NonFiniteError, OrderError
from nipq.functional.bitwidth import raw_from_bits
from nipq.functional.noise import uniform_noise
from nipq.functional.proxy import noise_proxy
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model, inputs_of, to_device
from nipq.prepare.layer_table import layer_table, quantizers

#: Distance from the ends of the range at which a start is kept, in bits: nearer, the sigmoid hardly moves.
MARGIN = 0.25

LossFn = Callable[[Any, Any], Tensor]


def start_bits_(
    model: nn.Module, loader: Iterable[Any], loss_fn: LossFn, budget: Budget, *, batches: int = 32, seed: int = 0
) -> dict[str, float]:
    """Start the learned bit-widths at the budget, more of them where noise hurts more; see the module's text.

    Call it after ``prepare_`` and ``calibrate_``, and calibrate again afterwards: boundaries belong to bit-widths.
    Modes, phases, weights and batch-norm statistics stay as they are. With several ranks each reads as many batches of
    its own, with noise of its own, and all end with the same bit-widths: those of the mean.

    Args:
        model: a prepared and calibrated model, its bits where ``prepare_`` put them.
        loader: ``(inputs, targets)``.
        loss_fn: of outputs and targets.
        budget: the limits.
        batches: how many batches to read, at least 1; two forwards and backwards each.
        seed: of the noise.

    Returns:
        The loss that each tensor with a learned bit-width is charged with at its former bits, by its name.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared or not calibrated.
        ConfigError: if the loader is empty or yields no targets.
        NonFiniteError: if a gradient is not finite.
        DistributedError: if ranks hold different models or read different numbers of batches, or one of them failed.
    """
    check_feasible(model, budget)
    check_same_(model, "start_bits_")
    table = BitTable(layer_table(model))
    learned = [quantizer for quantizer in quantizers(model) if not quantizer.is_frozen]
    if not learned:
        return {}
    losses = noise_losses(model, learned, loader, loss_fn, batches=batches, seed=seed)
    rows = []
    for members, allowed in zip(table.members, table.choices, strict=True):
        loss, former = sum(losses.get(member.name, 0.0) for member in members), float(members[0].bits.detach())
        rows.append(np.array([loss * 4.0 ** (former - bits) for bits in allowed]))
    chosen = from_rank_zero(lambda: least_loss_bits(table.choices, rows, budget.limits(model)))
    for quantizer, bits in zip(table.quantizers, chosen, strict=True):
        if not quantizer.is_frozen:
            low, high = quantizer.bit_range.low, quantizer.bit_range.high
            start = torch.tensor(min(max(bits, low + MARGIN), high - MARGIN))
            with torch.no_grad():
                quantizer.bit_raw.fill_(raw_from_bits(start, low, high))
    return losses


def noise_losses(
    model: nn.Module,
    quantizers: list[TensorQuantizer],
    loader: Iterable[Any],
    loss_fn: LossFn,
    *,
    batches: int,
    seed: int = 0,
) -> dict[str, float]:
    """Loss that the noise of each tensor adds at its present bits, -E[dL / db] / (2 ln 2), by the tensor's name.

    A mean below its own standard error over batches counts as the standard error, so none is 0 or negative.

    Args:
        model: a prepared and calibrated model.
        quantizers: those to measure; all of them are noisy at once, which changes no expectation to second order.
        loader: ``(inputs, targets)``.
        loss_fn: of outputs and targets.
        batches: how many batches to read.
        seed: of the noise.

    Returns:
        Losses, in units of ``loss_fn``.

    Raises:
        As :func:`start_bits_`, but for the budget.
    """
    found: list[list[float]] = []
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()  # batch norms evaluate, so that their statistics stay
        with all_or_none("start_bits_"):
            for number, batch in enumerate(islice(loader, batches)):
                found.append(_slopes(inner(model), quantizers, batch, loss_fn, rank_seed(seed + number)))
            if not found:
                raise ConfigError("start_bits_: expected batches, found an empty loader. Give one that yields some.")
    finally:
        for module, mode in modes.items():
            module.training = mode
    counts = gather_objects(len(found))
    if len(set(counts)) > 1:
        raise DistributedError(
            f"start_bits_: expected as many batches on every rank, found {counts}. Pass batches={min(counts)}."
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
    loss_fn: LossFn,
    seed: int,
) -> list[float]:
    """Slope of the loss in each quantizer's bits on one batch, summed over noise of both signs."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ConfigError("start_bits_: expected batches (inputs, targets), found one without targets.")
    device = next(model.parameters()).device
    inputs, targets = to_device(inputs_of(batch), device), to_device(batch[1], device)
    totals = [0.0] * len(quantizers)
    for sign in (1.0, -1.0):
        with _probed(quantizers, sign, seed) as bits:
            loss = loss_fn(call_model(model, inputs), targets)
            slopes = torch.autograd.grad(loss, list(bits.values()), materialize_grads=True)
        totals = [total + float(slope) for total, slope in zip(totals, slopes, strict=True)]
    return totals


def _charge(name: str, values: list[float]) -> float:
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: expected finite gradients under noise, found NaN or infinity. Check the model.")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return max(float(np.mean(values)), error, 1e-12)


@contextmanager
def _probed(quantizers: list[TensorQuantizer], sign: float, seed: int) -> Iterator[dict[str, Tensor]]:
    """Let quantizers add noise of a given sign, drawn alike for either; yields a leaf for each one's bits."""
    bits = {quantizer.name: quantizer.bits.detach().clone().requires_grad_() for quantizer in quantizers}
    generator = Generator(quantizers[0].alpha_raw.device).manual_seed(seed)

    def probe(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated boundary, found none. Call nipq.calibrate_ before."
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


def allocate_bits_(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget,
    loss_fn: LossFn | None = None,
    *,
    method: str = "noise",
    batches: int = 32,
    seed: int = 0,
) -> dict[str, float]:
    """Allocate the first bit-widths at the budget."""
    if loss_fn is None or method != "noise":
        return {}
    return start_bits_(model, loader, loss_fn, budget, batches=batches, seed=seed)
