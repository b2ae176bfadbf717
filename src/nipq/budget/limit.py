"""One limit on one model: a cost form with a number that it may not exceed, its range, and what a model costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from nipq.budget.bit_table import BitTable
from nipq.errors import ConfigError
from nipq.functional.cost import CostForm, cost
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow

Mode = Literal["bound", "target"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, eq=False)
class Limit:
    """One limit on one model.

    Attributes:
        name: what is limited, such as ``"average weight bits"``.
        unit: unit of ``target`` and of the form's cost.
        target: the limit, in ``unit``.
        mode: ``"bound"``, an upper bound; ``"target"``, as near as whole bits allow, and not above either.
        form: cost of a choice of bits, in ``unit``.
        denominator: what the form's numbers were divided by; times it they are whole, so sums can be exact.
        accounting: what is counted, first and last layers included or not, in words.
    """

    name: str
    unit: str
    target: float
    mode: Mode
    form: CostForm
    denominator: int
    accounting: str

    def exact_cost(self, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> Fraction:
        """Cost of whole bit-widths without any rounding error, in ``unit``."""
        total = self._whole(self.form.constant)
        total += sum(self._whole(c) * b for c, b in zip(self.form.weight.tolist(), weight_bits, strict=True))
        layers = zip(
            self.form.activation.tolist(),
            self.form.product.tolist(),
            self.form.weight_of_layer.tolist(),
            activation_bits,
            strict=True,
        )
        total += sum((self._whole(a) + self._whole(p) * weight_bits[w]) * b for a, p, w, b in layers)
        return Fraction(total, self.denominator)

    def allows(self, cost: Fraction) -> bool:
        """Whether a cost is not above the limit; the limit is read as it is written, 4.1 is 41/10."""
        return cost <= Fraction(str(self.target))

    def _whole(self, coefficient: float) -> int:
        return round(coefficient * self.denominator)

    def __str__(self) -> str:
        """Name, target, unit and accounting on one line."""
        sign = "<=" if self.mode == "bound" else "->"
        return f"{self.name} {sign} {self.target:,.10g} {self.unit} ({self.accounting})"


@dataclass(frozen=True)
class LimitCost:
    """What a model costs under one limit.

    Attributes:
        name: as in :class:`Limit`.
        unit: of all numbers here.
        target: the limit.
        mode: ``"bound"`` or ``"target"``.
        soft: cost of the learned, continuous bit-widths.
        rounded: cost of the nearest allowed bit-widths, which evaluation uses.
    """

    name: str
    unit: str
    target: float
    mode: Mode
    soft: float
    rounded: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """All of it on one line."""
        return (
            f"{self.name}: {self.rounded:,.6g} {self.unit} rounded, {self.soft:,.6g} soft; "
            f"{'limit' if self.mode == 'bound' else 'target'} {self.target:,.10g}"
        )


@dataclass(frozen=True)
class FeasibleRange:
    """The costs within reach under one limit: all bit-widths lowest, and all highest; fixed ones as they are.

    Attributes:
        name: as in :class:`Limit`.
        unit: of all numbers here.
        target: the limit.
        mode: ``"bound"`` or ``"target"``.
        low: cost of the fewest bits.
        high: cost of the most bits.
        accounting: what is counted, in words.
    """

    name: str
    unit: str
    target: float
    mode: Mode
    low: float
    high: float
    accounting: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """All of it on one line."""
        sign = "<=" if self.mode == "bound" else "->"
        return (
            f"{self.name} {sign} {self.target:,.10g} {self.unit}, "
            f"possible {self.low:,.6g} to {self.high:,.6g} {self.unit} ({self.accounting})"
        )


def exact_range(limit: Limit, table: BitTable) -> tuple[Fraction, Fraction]:
    """Costs of the fewest and of the most bits, in the limit's unit; costs grow with every bit-width."""
    count = len(table.weights)
    ends = [[pick(choices) for choices in table.choices] for pick in (min, max)]
    low, high = (limit.exact_cost(bits[:count], bits[count:]) for bits in ends)
    return low, high


def feasible_range(limit: Limit, rows: Sequence[LayerRow]) -> FeasibleRange:
    """The costs that the allowed bit-widths can reach under one limit.

    Args:
        limit: the limit.
        rows: ``layer_table(model)`` of the model that the limit was made for.

    Returns:
        The range, with fixed bit-widths as they are.
    """
    low, high = exact_range(limit, BitTable(rows))
    return FeasibleRange(limit.name, limit.unit, limit.target, limit.mode, float(low), float(high), limit.accounting)


def limit_cost(limit: Limit, table: BitTable) -> LimitCost:
    """What the model costs now under one limit.

    Args:
        limit: the limit.
        table: of the model that the limit was made for.

    Returns:
        The cost of the continuous and of the rounded bit-widths.

    Raises:
        NonFiniteError: if a bit-width is not finite.
    """
    bits = table.bits().detach()
    table.check_finite(bits)
    form = limit.form.to(table.device)
    soft, rounded = (float(cost(form, *table.split(choice))) for choice in (bits, table.round(bits)))
    return LimitCost(limit.name, limit.unit, limit.target, limit.mode, soft, rounded)


def cost_form(
    table: BitTable,
    weight: Iterable[tuple[TensorQuantizer, float]] = (),
    activation: Iterable[tuple[TensorQuantizer, float]] = (),
    product: Iterable[tuple[TensorQuantizer, float]] = (),
    constant: float = 0.0,
) -> CostForm:
    """A cost form with zeros for what is left out; costs of tensors that share a bit-width add up.

    Args:
        table: the tensors.
        weight: tensors and the cost of one bit of each.
        activation: likewise, of inputs, keys and values.
        product: inputs, and the cost of one bit times one bit of its layer's weight.
        constant: what does not depend on bits.

    Returns:
        The form over the table's weights and inputs.
    """
    count = len(table.weights)
    each = torch.zeros(len(table.quantizers), dtype=torch.float64)
    products = torch.zeros(len(table.inputs), dtype=torch.float64)
    for quantizer, cost_of_bit in (*weight, *activation):
        each[table.place[quantizer]] += cost_of_bit
    for quantizer, cost_of_both in product:
        products[table.place[quantizer] - count] += cost_of_both
    return CostForm(float(constant), each[:count].clone(), each[count:].clone(), products, table.weight_of_input)


def average_limit(
    name: str, target: float, mode: Mode, table: BitTable, counts: Sequence[tuple[TensorQuantizer, int]], what: str
) -> Limit:
    """A limit on the average bit-width of some tensors.

    Args:
        name: of what, ``"weight"`` or ``"activation"``.
        target: bits.
        mode: ``"bound"`` or ``"target"``.
        table: the tensors.
        counts: those that count, and their elements.
        what: is counted, in words.
    """
    total = sum(count for _, count in counts)
    form = cost_form(table, [(quantizer, count / total) for quantizer, count in counts])
    return Limit(f"average {name} bits", "bit", float(target), mode, form, total, what)


def stored_rows(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """One row for each weight that is stored: of layers that share one the first, one that multiplies if any does."""
    first: dict[object, LayerRow] = {}
    for row in sorted(rows, key=lambda row: row.spec.is_table):
        if not row.spec.is_product:
            first.setdefault(row.weight, row)
    return [first[quantizer] for quantizer in dict.fromkeys(row.weight for row in rows) if quantizer in first]


def activation_counts(rows: Sequence[LayerRow]) -> list[tuple[TensorQuantizer, int]]:
    """Elements per sample of every quantized activation, keys and values of attention among them.

    Args:
        rows: ``layer_table(model)``.

    Returns:
        Quantizer and count; 0 for the model's own input, whose bits are those of its source.
    """
    found: list[tuple[TensorQuantizer, int]] = []
    for row in rows:
        if row.input is not None:
            found.append((row.input, 0 if row.spec.is_input else row.spec.activation_count))
        if row.spec.is_product:
            found.append((row.weight, row.spec.other_count))
    return found


def whole_amount(value: float | str, kind: str, units: str, example: str) -> int:
    """A whole number out of a number or a text with a prefix and perhaps a unit; computed exactly, then rounded down.

    Args:
        value: such as ``1200000`` or ``"1.2 MB"``.
        kind: whose argument it is, for the message.
        units: units that may follow, lower case, separated by ``|``.
        example: of a good text, for the message.

    Returns:
        The amount, at least 1.

    Raises:
        ConfigError: if the value cannot be read or is below 1.
    """
    match = re.fullmatch(rf"\s*([0-9.]+(?:e[+-]?\d+)?)\s*({'|'.join(_PREFIXES)})(?:{units})?\s*", str(value).lower())
    try:
        amount = math.floor(Fraction(match[1]) * _PREFIXES[match[2]]) if match else 0
    except ValueError:  # such as two points
        amount = 0
    if amount < 1:
        raise ConfigError(f"{kind}: expected a number above 0 like 1200000 or {example}, found {value!r}. Change it.")
    return amount
