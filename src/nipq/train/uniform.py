"""One bit-width for all tensors: what methods without learned bit-widths are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget, check_feasible
from nipq.prepare.layer_table import layer_table


def uniform_bits_(model: nn.Module, budget: Budget) -> None:
    """Freeze every learned bit-width at the largest common one that keeps the budget.

    The common bit-width is raised for all tensors together; where it can rise no more, first that of the weights and
    then that of the inputs rises alone, so a budget of 4 bits for weights and 3 for activations is met as it stands. A
    tensor that may not have the common bit-width takes the next lower one that it may. Fixed bit-widths stay.

    Args:
        model: A prepared model; calibrate it afterwards, as boundaries are for the bit-widths of the moment.
        budget: The limits.

    Raises:
        BudgetError: If no allowed bit-widths keep the budget.
        OrderError: If the model is not prepared.
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
    for quantizer, width in zip(table.quantizers, bits((weights, inputs)), strict=True):
        quantizer.freeze_bits_(width)


def _at_most(allowed: Sequence[int], width: int) -> int:
    """The largest allowed bit-width that is not above ``width``, or the smallest of all."""
    return max((choice for choice in allowed if choice <= width), default=min(allowed))


def _largest(widths: Sequence[int], keeps: Callable[[int], bool]) -> int:
    """The last of ascending widths that keeps the budget; the first one does, as costs grow with every bit."""
    return max(width for width in widths if keeps(width))
