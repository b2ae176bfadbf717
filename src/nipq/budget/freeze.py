"""Freeze: from learned, continuous bit-widths to whole ones that keep the budget exactly.

At the learned optimum, one more bit anywhere buys as much accuracy as its price (reverse water-filling). Noise power
falls as 4^-b, so the power that tensor q had at its learned b*_q is, up to one common factor, its price c_q = sum over
limits of d cost / d b_q / target at that point, and at b bits it is c_q 4^(b*_q - b). The freeze minimises the sum::

    min  sum_q c_q 4^(b*_q - b_q)     b_q in the allowed bit-widths,  every cost <= its limit

by :mod:`nipq.budget.solver`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nipq.budget.bit_table import BitTable, Limit, LimitCost, limit_cost
from nipq.budget.budget import Budget, check_feasible
from nipq.budget.solver import Choices, least_loss_bits, prices
from nipq.distributed import all_or_none, check_same_, from_rank_zero
from nipq.errors import OrderError
from nipq.nn.layers import quantization
from nipq.prepare.layer_table import check_finite, layer_table, quantizers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """Bit-widths chosen by ``freeze_bits_``.

    Attributes:
        bits: whole bit-width of each tensor, by its full name.
        soft: the learned one before.
        costs: of the model now, for each limit of the budget.
    """

    bits: dict[str, int]
    soft: dict[str, float]
    costs: tuple[LimitCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for each tensor and each limit."""
        width = max(map(len, self.bits))
        lines = [f"{name:{width}}  {self.soft[name]:6.2f} -> {bits}" for name, bits in self.bits.items()]
        return "\n".join([*lines, *map(str, self.costs)])


def freeze_bits_(model: nn.Module, budget: Budget | None = None) -> Assignment:
    """Turn learned bit-widths into whole numbers that no optimizer moves any more, within the budget.

    No limit is ever exceeded, one with ``mode="target"`` included. Fixed bit-widths stay as they are; a shared weight
    is decided once. Without a budget every bit-width becomes the nearest allowed one. With several ranks the first one
    decides for all, once it is certain that all hold the same parameters.

    Args:
        model: a prepared model.
        budget: the limits, usually ``search.budget``.

    Returns:
        The bit-widths, by tensor.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget, naming the range.
        OrderError: if the model is not prepared.
        OrderError: if bit-widths were frozen within another budget before; they would stay.
        NonFiniteError: if a bit-width, a weight or a clipping range is not finite.
        DistributedError: if ranks hold different models.
    """
    table = BitTable(layer_table(model))
    soft = table.bits().detach()
    table.check_finite(soft)
    check_same_(model, "freeze_bits_")
    with all_or_none("freeze_bits_"):
        check_finite(model, "freeze_bits_: ")
    limits: list[Limit] = []
    if budget is None:
        bits = [int(choice) for choice in table.round(soft).tolist()]
    else:
        check_feasible(model, budget)
        limits = budget.limits(model)
        check_same_freeze(model, limits)
        bits = from_rank_zero(lambda: assign(table.choices, soft.cpu().numpy(), limits))
    return freeze_to_(model, bits, limits)


def freeze_to_(model: nn.Module, bits: Sequence[int], limits: Sequence[Limit] = ()) -> Assignment:
    """Freeze every bit-width at a given whole number.

    Args:
        model: a prepared model.
        bits: in the order of :class:`~nipq.budget.bit_table.BitTable`: weights, then inputs.
        limits: whose costs are to be told.

    Returns:
        What was frozen, what it was before, and the costs now.
    """
    table = BitTable(layer_table(model))
    soft = table.bits().detach().tolist()
    names = [quantizer.name for quantizer in table.quantizers]
    for quantizer, choice in zip(table.quantizers, bits, strict=True):
        quantizer.freeze_bits_(choice)
    frozen = BitTable(layer_table(model))
    costs = tuple(limit_cost(limit, frozen) for limit in limits)
    if limits:
        for row in layer_table(model):
            quantization(row.layer).frozen_within = _targets(limits)
    assignment = Assignment(dict(zip(names, bits, strict=True)), dict(zip(names, soft, strict=True)), costs)
    logger.info("frozen bit-widths:\n%s", assignment)
    return assignment


def check_same_freeze(model: nn.Module, limits: Sequence[Limit]) -> None:
    """Refuse another budget for bit-widths that were frozen within one: nothing is left to choose.

    Args:
        model: a prepared model.
        limits: of the budget now.

    Raises:
        OrderError: if all bit-widths were frozen within other limits.
    """
    rows = layer_table(model)
    before, wanted = quantization(rows[0].layer).frozen_within, _targets(limits)
    if before is None or before == wanted or any(not quantizer.is_frozen for quantizer in quantizers(model)):
        return
    was, now = (", ".join(f"{name} {target:g}" for name, target in found.items()) for found in (before, wanted))
    raise OrderError(
        f"{type(model).__name__}: expected learned bit-widths to freeze within {now}, found them frozen within {was}. "
        "They no longer change: load a state from before the freeze, or prepare the model anew."
    )


def _targets(limits: Sequence[Limit]) -> dict[str, float]:
    return {limit.name: float(limit.target) for limit in limits}


def assign(choices: Choices[int], soft: NDArray[np.float64], limits: Sequence[Limit]) -> list[int]:
    """The allowed bit-widths with the least implied noise whose costs keep every limit, exactly.

    A tensor that no limit prices takes the allowed bit-width nearest to its soft one.

    Args:
        choices: allowed bit-widths of each tensor, ascending; weights first, then inputs, as in the limits' forms.
        soft: learned bit-widths, same order.
        limits: what may not be exceeded.

    Returns:
        One bit-width for each tensor.

    Raises:
        BudgetError: if even the fewest bits exceed a limit.
    """
    noise = [
        price * 4.0 ** (b - np.array(allowed)) if price > 0 else np.abs(b - np.array(allowed))
        for price, b, allowed in zip(prices(limits, soft), soft, choices, strict=True)
    ]
    return least_loss_bits(choices, noise, limits)
