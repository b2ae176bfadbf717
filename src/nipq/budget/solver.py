"""ILP solver: whole bit-widths of least summed loss within a budget.

For every tensor q and each of its allowed bit-widths b a loss l_q(b) is given. The integer linear programme is::

    min  sum_q l_q(b_q)     b_q in the allowed bit-widths,  every cost <= its limit

With one 0/1 variable for each tensor and bit-width, costs are linear; bit-operations hold products of two tensors'
choices, which become linear by one continuous variable for each pair of bit-widths in a layer. The solver works in
floating point, so its answer is checked in whole numbers and, if need be, lowered.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nipq.budget.bit_table import Limit
from nipq.errors import BudgetError
from nipq.functional.cost import cost

#: Exact numbers, as costs are checked without rounding.
Bits = TypeVar("Bits", int, Fraction)
Choices = Sequence[tuple[Bits, ...]]

#: Relative gap to the proven optimum at which the solver may stop, and seconds after which it must; it then has an
#: answer that keeps the budget, perhaps not the best one. Only bit-operations of large models come near the time.
GAP, SECONDS = 1e-3, 10.0

logger = logging.getLogger(__name__)


def least_loss_bits(
    choices: Choices[Bits], losses: Sequence[NDArray[np.float64]], limits: Sequence[Limit]
) -> list[Bits]:
    """The allowed bit-widths with the least summed loss whose costs keep every limit, exactly.

    Args:
        choices: allowed bit-widths of each tensor, ascending; weights first, then inputs, as in the limits' forms.
        losses: of each tensor, the loss at each of its allowed bit-widths, >= 0, in one unit for all tensors.
        limits: what may not be exceeded.

    Returns:
        One bit-width for each tensor.

    Raises:
        BudgetError: if even the fewest bits exceed a limit.
    """
    fewest = [allowed[0] for allowed in choices]
    for limit in limits:
        if not _allowed(limit, fewest):
            raise BudgetError(
                f"budget: expected {limit.name} of at least {float(_exact(limit, fewest)):,.10g} {limit.unit}, the "
                f"cost of the fewest bits; found {limit.target:,.10g}. Raise the limit, or allow fewer bits."
            )
    return _lower(_solve(choices, losses, limits), choices, losses, limits)


@torch.enable_grad()
def prices(limits: Sequence[Limit], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Price of one bit of each tensor: sum over limits of d cost / d bits / target, at given bit-widths.

    Args:
        limits: the limits.
        at: bit-widths, weights first, then inputs, as in the limits' forms.

    Returns:
        One price for each tensor, per bit; 0 for one that no limit counts.
    """
    bits = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    total = 0 * bits.sum()
    for limit in limits:
        weights = len(limit.form.weight)
        total = total + cost(limit.form, bits[:weights], bits[weights:]) / limit.target
    found: NDArray[np.float64] = torch.autograd.grad(total, bits)[0].numpy()
    return found


def _solve(choices: Choices[Bits], losses: Sequence[NDArray[np.float64]], limits: Sequence[Limit]) -> list[Bits]:
    """Nearly the best bit-widths, up to the solver's tolerances; the fewest bits if it finds none in time."""
    # Here, as scipy would be a fifth of the time that ``import nipq`` takes.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    first = np.concatenate([[0], np.cumsum([len(allowed) for allowed in choices])])
    pairs = _Pairs(choices, first, limits)
    variables = pairs.end
    objective = np.zeros(variables)
    # A common factor changes nothing but keeps the numbers near 1, where the solver's tolerances are meant to be.
    least, most = (sum(float(end(values)) for values in losses) for end in (np.min, np.max))
    objective[: first[-1]] = np.concatenate(losses) / (least or most or 1.0)
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    lower: list[float] = []
    upper: list[float] = []

    def constrain(terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        for column, value in terms:
            rows.append(len(lower))
            columns.append(column)
            values.append(value)
        lower.append(low)
        upper.append(high)

    for place, allowed in enumerate(choices):  # one bit-width for each tensor
        constrain([(first[place] + k, 1.0) for k in range(len(allowed))], 1, 1)
    for terms in pairs.links:  # a pair is chosen when both of its bit-widths are
        constrain(terms, 0, 0)
    for limit in limits:
        terms = _linear_terms(limit, choices, first) + pairs.terms(limit)
        room = (limit.target - limit.form.constant) / limit.target
        constrain([(column, value / limit.target) for column, value in terms], -np.inf, room)
    matrix = coo_array((values, (rows, columns)), shape=(len(lower), variables)).tocsr()
    # Its C++ prints a line now and then, whatever its options; to move the process's standard output aside meanwhile
    # would take it from other threads, too. Commands do so, once (``nipq.cli.output``).
    result = milp(
        objective,
        integrality=(np.arange(variables) < first[-1]).astype(int),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        logger.warning("the solver found no bit-widths (%s); going on from the fewest", result.message)
        return [allowed[0] for allowed in choices]
    if result.status == 1:
        logger.warning("the solver stopped after %g s, %.2g above the proven optimum", SECONDS, result.mip_gap)
    return [allowed[int(np.argmax(result.x[s : s + len(allowed)]))] for s, allowed in zip(first, choices, strict=False)]


class _Pairs:
    """Variables for the products in the limits: one for each pair of bit-widths of a layer's weight and input."""

    def __init__(self, choices: Choices[Any], first: NDArray[np.int64], limits: Sequence[Limit]) -> None:
        self.choices = choices
        self.start: dict[int, int] = {}
        self.links: list[list[tuple[int, float]]] = []
        self.end = int(first[-1])
        if not limits:
            return
        form = limits[0].form
        weights = len(form.weight)
        priced = torch.stack([limit.form.product for limit in limits]).abs().sum(0).tolist()
        self.layers = [
            (layer, weight, weights + layer)
            for layer, weight in enumerate(form.weight_of_layer.tolist())
            if priced[layer] > 0
        ]
        for layer, weight, activation in self.layers:
            self.start[layer] = self.end
            count, width = len(choices[weight]), len(choices[activation])
            self.end += count * width
            for k in range(count):
                row = [(self.start[layer] + k * width + m, 1.0) for m in range(width)]
                self.links.append([*row, (int(first[weight]) + k, -1.0)])
            for m in range(width):
                column = [(self.start[layer] + k * width + m, 1.0) for k in range(count)]
                self.links.append([*column, (int(first[activation]) + m, -1.0)])

    def terms(self, limit: Limit) -> list[tuple[int, float]]:
        """Variable and cost of each pair under one limit."""
        product = limit.form.product.tolist()
        return [
            (self.start[layer] + k * len(self.choices[activation]) + m, product[layer] * wb * ab)
            for layer, weight, activation in self.layers
            for k, wb in enumerate(self.choices[weight])
            for m, ab in enumerate(self.choices[activation])
            if product[layer]
        ]


def _linear_terms(limit: Limit, choices: Choices[Bits], first: NDArray[np.int64]) -> list[tuple[int, float]]:
    coefficients = torch.cat([limit.form.weight, limit.form.activation]).tolist()
    return [
        (int(first[place]) + k, coefficient * bits)
        for place, coefficient in enumerate(coefficients)
        for k, bits in enumerate(choices[place])
        if coefficient
    ]


def _lower(
    bits: list[Bits], choices: Choices[Bits], losses: Sequence[NDArray[np.float64]], limits: Sequence[Limit]
) -> list[Bits]:
    """Take bits away until every limit is kept in exact arithmetic, each time where it adds the least loss.

    A solution of the programme is above by no more than the solver's tolerance, so one bit somewhere is enough.
    """
    bits = list(bits)
    while exceeded := [limit for limit in limits if not _allowed(limit, bits)]:
        price = prices(exceeded, np.array(bits, dtype=np.float64))
        added = {
            place: float(losses[place][level - 1] - losses[place][level])
            for place, allowed in enumerate(choices)
            if (level := allowed.index(bits[place])) and price[place] > 0
        }
        place = min(added, key=added.__getitem__)
        bits[place] = choices[place][choices[place].index(bits[place]) - 1]
    return bits


def _exact(limit: Limit, bits: Sequence[Bits]) -> Fraction:
    weights = len(limit.form.weight)
    return limit.exact_cost(bits[:weights], bits[weights:])


def _allowed(limit: Limit, bits: Sequence[Bits]) -> bool:
    return limit.allows(_exact(limit, bits))
