"""First bit-widths within a budget: by noise sensitivity, by HAWQ's curvature, or one width for all tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nipq.budget.bit_table import BitTable, Limit
from nipq.budget.budget import Budget, check_feasible
from nipq.budget.sensitivity import LossFn, noise_losses
from nipq.budget.solver import least_loss_bits
from nipq.distributed import check_same_, from_rank_zero
from nipq.errors import ConfigError
from nipq.functional.bitwidth import raw_from_bits
from nipq.prepare.batches import Inputs, check_rereadable
from nipq.prepare.layer_table import layer_table, quantizers

#: Ways of choosing the first bit-widths.
Method = Literal["noise", "hawq", "uniform"]

#: Distances from the ends of the range at which a learned bit-width may start, in bits, the largest feasible one first:
#: nearer to an end the sigmoid hardly moves, farther from it a tight budget is exceeded.
MARGINS = tuple(Fraction(1, 2**power) for power in range(2, 7))


def allocate_bits_(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget,
    loss_fn: LossFn | None = None,
    *,
    method: Method = "noise",
    batches: int = 32,
    seed: int = 0,
    rounds: int = 1,
    whole: bool = False,
    inputs: Inputs | None = None,
) -> dict[str, float]:
    """Choose the bit-widths of least summed loss within the budget, as starts for training or for good.

    ``"noise"`` measures the sensitivity of every tensor by noise of both signs (:mod:`nipq.budget.sensitivity`), with
    or without labels, and solves the integer programme. Learned bit-widths start on the budget: the cost of the
    continuous bits is not above any limit, those at an end of their range kept ``MARGINS[0]`` bits away from it, or
    less where the budget leaves no room. (A budget that only the fewest bits keep is exceeded by a thousandth of the
    range.) ``"hawq"`` uses the traces of the Hessian (:mod:`nipq.budget.hawq`; needs labels and the ``analysis`` extra)
    and ``"uniform"`` gives all tensors one width; both freeze.

    Call it after ``prepare_`` and ``calibrate_``, and calibrate again afterwards: clipping ranges belong to bit-widths.
    Modes, phases, weights and batch-norm statistics stay as they are. With several ranks each reads as many batches of
    its own, with noise of its own, and all end with the same bit-widths: those of the mean.

    Args:
        model: a prepared and calibrated model, its bits where ``prepare_`` put them.
        loader: batches, with targets if ``loss_fn`` is given.
        budget: the limits.
        loss_fn: of outputs and targets, a scalar; if left out, the distance from the float network's own outputs.
        method: see above.
        batches: how many batches to read, at least 1 (``"noise"``).
        seed: of the noise or of the random vectors.
        rounds: how often to measure; from the second time on at the bits chosen before, which helps at low budgets when
            no training follows (``"noise"``).
        whole: count the cost of the nearest whole bits and keep no margin, for bits that are frozen next instead of
            learned (``"noise"``).
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        Loss that the noise of each tensor adds at its former bits, by its name (in the last round); empty where nothing
        was measured by noise.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared or not calibrated.
        ConfigError: if a setting is unknown, the loader is empty, a batch is not what the model takes, or targets are
            missing.
        NonFiniteError: if a gradient is not finite.
        DistributedError: if ranks hold different models or read different numbers of batches, or one of them failed.
    """
    if method not in get_args(Method):
        raise ConfigError(f"allocate_bits_: expected method 'noise', 'hawq' or 'uniform', found {method!r}.")
    if rounds < 1 or batches < 1:
        raise ConfigError(
            f"allocate_bits_: expected rounds and batches of at least 1, found {rounds} and {batches}. Raise them."
        )
    if rounds > 1:
        check_rereadable(loader, "allocate_bits_")
    check_feasible(model, budget)
    check_same_(model, "allocate_bits_")
    learned = [quantizer for quantizer in quantizers(model) if not quantizer.is_frozen]
    if not learned:
        return {}
    losses: dict[str, float] = {}
    if method == "uniform":
        uniform_bits_(model, budget)
    elif method == "hawq":
        _allocate_by_curvature_(model, loader, budget, loss_fn, seed, inputs)
    else:
        for left in reversed(range(rounds)):
            losses = noise_losses(model, learned, loader, loss_fn, batches=batches, seed=seed, inputs=inputs)
            _assign_(model, losses, budget, whole=whole or left > 0)
    return losses


def _allocate_by_curvature_(
    model: nn.Module, loader: Iterable[Any], budget: Budget, loss_fn: LossFn | None, seed: int, inputs: Inputs | None
) -> None:
    if loss_fn is None:
        raise ConfigError(
            'allocate_bits_: expected loss_fn with method="hawq", which needs the Hessian of the task\'s loss, found '
            'none. Give it and a loader with targets, or use method="noise".'
        )
    from nipq.budget.hawq import allocate_  # the Hessian's code, needed here alone

    allocate_(model, loader, loss_fn, budget, seed=seed, inputs=inputs)


def _assign_(model: nn.Module, losses: dict[str, float], budget: Budget, *, whole: bool) -> None:
    """Set learned bits to the assignment of least loss; at whole bits, or where learning starts."""
    table, limits = BitTable(layer_table(model)), budget.limits(model)
    summed = []
    for members, allowed in zip(table.members, table.choices, strict=True):
        loss, former = sum(losses.get(member.name, 0.0) for member in members), float(members[0].bits.detach())
        summed.append(np.array([loss * 4.0 ** (former - bits) for bits in allowed]))
    margin = Fraction(0) if whole else _margin(table, limits)
    starts = _starts(table, margin)
    chosen = from_rank_zero(lambda: _solved(starts, summed, limits))
    set_learned_bits_(table, chosen)


@torch.no_grad()
def set_learned_bits_(table: BitTable, bits: Sequence[float]) -> None:
    """Set learned bit-widths to given, continuous ones; frozen ones stay.

    Args:
        table: of a prepared model.
        bits: one number for each of its tensors, within its range; nearer to an end than a thousandth of the range
            counts as that near.
    """
    for quantizer, start in zip(table.quantizers, bits, strict=True):
        if not quantizer.is_frozen:
            low, high = quantizer.bit_range.low, quantizer.bit_range.high
            quantizer.bit_raw.fill_(raw_from_bits(torch.tensor(start, dtype=torch.float64), low, high))


def _starts(table: BitTable, margin: Fraction) -> list[tuple[Fraction, ...]]:
    """Start of each tensor for each of its choices: that width, or ``margin`` from an end of its range."""
    starts = []
    for quantizer, allowed in zip(table.quantizers, table.choices, strict=True):
        low, high = allowed[0] + margin, allowed[-1] - margin
        inside = [min(max(Fraction(bits), low), high) for bits in allowed]
        starts.append(tuple(map(Fraction, allowed) if quantizer.is_frozen else inside))
    return starts


def _margin(table: BitTable, limits: Sequence[Limit]) -> Fraction:
    """The largest margin with which the fewest bits keep every limit, or 0."""
    count = len(table.weights)
    for margin in MARGINS:
        fewest = [start[0] for start in _starts(table, margin)]
        if all(limit.allows(limit.exact_cost(fewest[:count], fewest[count:])) for limit in limits):
            return margin
    return Fraction(0)


def _solved(
    starts: Sequence[tuple[Fraction, ...]], losses: Sequence[NDArray[np.float64]], limits: Sequence[Limit]
) -> list[float]:
    return [float(start) for start in least_loss_bits(starts, losses, limits)]


def uniform_bits_(model: nn.Module, budget: Budget) -> None:
    """Freeze every learned bit-width at the largest common one that keeps the budget.

    The common bit-width is raised for all tensors together; where it can rise no more, first that of the weights and
    then that of the inputs rises alone, so a budget of 4 bits for weights and 3 for activations is met as it stands. A
    tensor that may not have the common bit-width takes the next lower one that it may. Fixed bit-widths stay.

    Args:
        model: a prepared model; calibrate it afterwards, as clipping ranges are for the bit-widths of the moment.
        budget: the limits.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared.
    """
    for quantizer, width in zip(BitTable(layer_table(model)).quantizers, uniform_bits(model, budget), strict=True):
        quantizer.freeze_bits_(width)


def uniform_bits(model: nn.Module, budget: Budget) -> list[int]:
    """The bit-widths that :func:`uniform_bits_` freezes, in the order of :class:`~nipq.budget.bit_table.BitTable`.

    Args:
        model: a prepared model.
        budget: the limits.

    Raises:
        As :func:`uniform_bits_`.
    """
    check_feasible(model, budget)
    table = BitTable(layer_table(model))
    count, limits = len(table.weights), budget.limits(model)

    def bits(common: tuple[int, int]) -> list[int]:
        return [_at_most(allowed, common[place >= count]) for place, allowed in enumerate(table.choices)]

    def keeps(common: tuple[int, int]) -> bool:
        chosen = bits(common)
        return all(limit.allows(limit.exact_cost(chosen[:count], chosen[count:])) for limit in limits)

    widths = sorted({width for allowed in table.choices for width in allowed})
    both = _largest(widths, lambda width: keeps((width, width)))
    weights = _largest(widths, lambda width: keeps((max(width, both), both)))
    inputs = _largest(widths, lambda width: keeps((weights, max(width, both))))
    return bits((weights, inputs))


def _at_most(allowed: Sequence[int], width: int) -> int:
    """The largest allowed bit-width that is not above ``width``, or the smallest of all."""
    return max((choice for choice in allowed if choice <= width), default=min(allowed))


def _largest(widths: Sequence[int], keeps: Callable[[int], bool]) -> int:
    """The last of ascending widths that keeps the budget; the first one does, as costs grow with every bit."""
    return max(width for width in widths if keeps(width))
