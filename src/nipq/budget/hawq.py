"""HAWQ: bit-widths allocated by the curvature (Hessian trace) of the float network, a baseline for learned bits.

A tensor that is changed by e raises the loss by e^T H e / 2 to second order, at a minimum. With an error spread evenly
over directions this is tr H ||e||^2 / (2 N), so the loss that tensor q is charged with at b bits is::

    Omega_q(b) = tr(H_q) / N_q * ||Q_b(w_q) - w_q||^2

HAWQ-v2 (arXiv 1911.03852) defines it for weights, and for activations with the Hessian in the activation, trace and
squared error of one sample averaged over samples; HAWQ-v3 (arXiv 2011.10680) chooses the bits by an integer linear
programme, min sum_q Omega_q(b_q) within the budget. H is taken at the float weights, Q_b has the clipping range of
least noise error at b bits (T6 in the paper map), and what both share is left out: the factor 1/2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget, check_feasible
from nipq.budget.freeze import Assignment, freeze_to_
from nipq.budget.hessian import (
    LabelledBatch,
    LossFn,
    Trace,
    float_copy,
    input_samples,
    input_traces,
    labelled,
    weight_traces,
)
from nipq.budget.solver import least_loss_bits
from nipq.distributed import all_or_none, check_same_, from_rank_zero, gather_objects, inner, world_size
from nipq.errors import ConfigError, OrderError
from nipq.functional.clipping import SAMPLE_SIZE, noise_optimal_range
from nipq.functional.uniform import quantize
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import BatchReader, Inputs, batches_of, call_model, to_device
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import layer_table


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the loss to the bit-width of one tensor.

    Attributes:
        name: full name of the tensor.
        trace: of its block of the Hessian, with the standard error of the estimate.
        errors: mean squared error of the quantizer, by bit-width.
        losses: the summands of the ILP, by bit-width: trace times mean squared error. A trace below its own
            standard error, a negative one for instance, counts as the standard error.
    """

    name: str
    trace: Trace
    errors: dict[int, float]
    losses: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


def allocate_(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn,
    budget: Budget,
    *,
    samples: int = 256,
    probes: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> Assignment:
    """Freeze the bit-widths that add the least loss, by the curvature of the float network, within the budget.

    Call it after ``prepare_`` and ``calibrate_`` on a trained float network, and calibrate again afterwards: clipping
    ranges belong to bit-widths. No limit is ever exceeded. Fixed bit-widths stay as they are; a tensor that no limit
    counts gets its most bits, for they cost nothing. With several ranks each reads its share of the samples, and all
    compute with all of them.

    Paper: not in it; a baseline of its section 2. Equation and sources in the module's text.

    Args:
        model: a prepared and calibrated model, in any phase.
        loader: ``(inputs, targets)``.
        loss_fn: of outputs and targets, a mean over samples, such as ``cross_entropy``; twice differentiable.
        budget: the limits.
        samples: whole batches are read until there are so many samples.
        probes: random vectors for each trace, at least 2.
        seed: of the random vectors.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        The bit-widths, by tensor.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget, naming the range.
        OrderError: if the model is not prepared, not calibrated, or a layer was not reached.
        ConfigError: if the loader is empty or yields no targets, or there is but one probe.
        MissingDependencyError: without curvlinops.
        DistributedError: if ranks hold different models, or one of them failed.
    """
    check_feasible(model, budget)
    check_same_(model, "allocate_")
    found = sensitivities(model, loader, loss_fn, samples=samples, probes=probes, seed=seed, inputs=inputs)
    losses = {one.name: np.array(list(one.losses.values())) for one in found}
    table, limits = BitTable(layer_table(model)), budget.limits(model)
    summed = [np.asarray(sum(losses.get(one.name, np.zeros(1)) for one in members)) for members in table.members]
    return freeze_to_(model, from_rank_zero(lambda: least_loss_bits(table.choices, summed, limits)), limits)


def sensitivities(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn,
    *,
    samples: int = 256,
    probes: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> list[Sensitivity]:
    """Loss that each tensor is charged with at each of its allowed bit-widths; see the module for the equation.

    Tensors whose bit-width is fixed are left out.

    Args:
        model: a prepared and calibrated model, not changed.
        loader: ``(inputs, targets)``.
        loss_fn: of outputs and targets, a mean over samples.
        samples: whole batches are read until there are so many samples.
        probes: random vectors for each trace, at least 2.
        seed: of the random vectors.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        Weights, then inputs, as in :class:`~nipq.budget.bit_table.BitTable`.

    Raises:
        As :func:`allocate_`, but for the budget.
    """
    if probes < 2:
        raise ConfigError(
            f"allocate_: expected 2 probes or more, found {probes}, which have no standard error. Add some."
        )
    model = inner(model)
    rows = layer_table(model)
    table = BitTable(rows)
    for quantizer in table.quantizers:
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated model, found a clipping range that was never set. "
                "Call nipq.calibrate_(model, loader) first; it also chooses the inputs' grids."
            )
    names = {module: name for name, module in model.named_modules()}
    copied = float_copy(model, quantized=False)
    weights: dict[str, nn.Parameter] = {}
    readers: dict[str, nn.Module] = {}
    for row in rows:
        if row.spec.is_product:
            if not row.weight.is_frozen:
                raise ConfigError(
                    f"{row.name}: expected attention of fixed bit-widths, as curvature is measured in weights and in "
                    "inputs of layers; found some to choose. Fix them, such as by Config(attention_bits=8)."
                )
            continue
        layer = copied.get_submodule(names[row.layer])
        if not row.weight.is_frozen:
            weights.setdefault(row.weight.name, float_weight(layer))
        if row.input is not None and not row.input.is_frozen:
            readers[row.input.name] = layer
    data = _first(loader, samples, next(copied.parameters()).device, BatchReader(model, inputs, "allocate_"))
    batches, own = [(batch.inputs, batch.targets) for batch in data], itemgetter(0)
    traces = input_traces(copied, batches, loss_fn, readers, probes=probes, seed=seed, inputs=own)
    if weights:
        traces |= weight_traces(copied, batches, loss_fn, weights, probes=probes, seed=seed, inputs=own)
    values: dict[str, Tensor] = {**weights, **_activations(copied, readers, [batch.inputs for batch in data])}
    open_ = [(q, choices) for q, choices in zip(table.quantizers, table.choices, strict=True) if not q.is_frozen]
    for quantizer, _ in open_:
        if quantizer.name not in traces:
            raise OrderError(
                f"{quantizer.name}: expected the batches to reach it, found that none did. "
                "Give batches that use the whole model, or exclude the layer with Rule(name, quantize=False)."
            )
    return [_sensitivity(q, traces[q.name], values[q.name], choices) for q, choices in open_]


def _sensitivity(quantizer: TensorQuantizer, trace: Trace, values: Tensor, choices: tuple[int, ...]) -> Sensitivity:
    errors = {bits: squared_error(quantizer, values, bits) for bits in choices}
    curvature = max(trace.trace, trace.error)
    return Sensitivity(quantizer.name, trace, errors, {bits: curvature * error for bits, error in errors.items()})


@torch.no_grad()
def squared_error(quantizer: TensorQuantizer, values: Tensor, bits: int) -> float:
    """Mean squared error at so many bits with the clipping range of least noise error, on the quantizer's grid.

    Args:
        quantizer: says on which grid and with how many clipping ranges.
        values: a tensor or a sample of it.
        bits: bit-width.

    Returns:
        E[(Q_b(x) - x)^2], units of x squared.
    """
    axis = quantizer.channel_axis if quantizer.alpha_raw.numel() > 1 else None
    alpha = noise_optimal_range(values, float(bits), quantizer.grid, channel_axis=axis)
    if axis is not None:
        alpha = alpha.reshape([-1 if place == axis else 1 for place in range(values.ndim)])
    return float((quantize(values, alpha, float(bits), quantizer.grid) - values).double().square().mean())


def _first(loader: Iterable[Any], samples: int, device: torch.device, reader: BatchReader) -> list[LabelledBatch]:
    """Batches of all ranks in the order of one process that is given the ranks' batches side by side."""
    found: list[LabelledBatch] = []
    with all_or_none("allocate_"):
        for batch in batches_of(loader, "allocate_"):
            found += labelled([batch], device, reader)
            if sum(one.count for one in found) * world_size() >= samples:
                break
        found = found or labelled([], device, reader)  # the latter raises
    if world_size() == 1:
        return found
    host = torch.device("cpu")
    ranks = gather_objects([_moved(batch, host) for batch in found])
    return [_moved(batch, device) for step in zip(*ranks, strict=False) for batch in step]


def _moved(batch: LabelledBatch, device: torch.device) -> LabelledBatch:
    return LabelledBatch(to_device(batch.inputs, device), to_device(batch.targets, device), batch.count)


def _activations(network: nn.Module, layers: Mapping[str, nn.Module], inputs: list[ExampleInputs]) -> dict[str, Tensor]:
    def run() -> None:
        for one in inputs:
            call_model(network, one)

    return input_samples(layers, run, max(1, SAMPLE_SIZE // len(inputs)))
