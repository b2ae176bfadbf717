"""Budgets of the finished model: average bits, bytes of the file, bit-operations; costs and feasible ranges.

Every limit is one :class:`~nipq.functional.cost.CostForm`. The penalty, the report, the feasible range and the freeze
read only that form, so they cannot count differently.
"""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from nipq.budget.bit_table import (
    BitTable,
    FeasibleRange,
    Limit,
    LimitCost,
    Mode,
    average_limit,
    cost_form,
    exact_range,
    feasible_range,
    limit_cost,
)
from nipq.errors import BudgetError, ConfigError
from nipq.export.packed_write import fixed_bytes
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow, layer_table

#: Decimal prefixes of units and their factors, ascending.
SI_PREFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
#: Prefixes that a budget may have, binary ones too. Case counts: m is milli, and b is a bit.
_PREFIXES = {"": 1, "K": 10**3} | SI_PREFIXES | {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def stored_rows(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """One row for each weight that is stored: of layers that share one the first, one that multiplies if any does."""
    first: dict[object, LayerRow] = {}
    for row in sorted(rows, key=lambda row: row.spec.is_table):
        if not row.spec.is_product:
            first.setdefault(row.weight, row)
    return [first[quantizer] for quantizer in dict.fromkeys(row.weight for row in rows) if quantizer in first]


def parameter_count(model: nn.Module, rows: Sequence[LayerRow]) -> int:
    """Elements of a model's own parameters, without those of its quantizers.

    Args:
        model: a prepared model.
        rows: ``layer_table(model)``.
    """
    parts = [part for row in rows for part in (row.weight, row.input) if part is not None]
    added = {parameter for part in parts for parameter in part.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if parameter not in added)


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
        units: units that may follow, separated by ``|``.
        example: of a good text, for the message.

    Returns:
        The amount, at least 1.

    Raises:
        ConfigError: if the value cannot be read or is below 1.
    """
    match = re.fullmatch(rf"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*({'|'.join(_PREFIXES)})(?:{units})?\s*", str(value))
    try:
        amount = math.floor(Fraction(match[1]) * _PREFIXES[match[2]]) if match else 0
    except ValueError:  # such as two points
        amount = 0
    if amount < 1:
        raise ConfigError(
            f"{kind}: expected a number above 0 like 1200000 or {example}, found {value!r}. Change it; prefixes are "
            f"{', '.join(filter(None, _PREFIXES))}, in upper and lower case as here."
        )
    return amount


#: Bits that an input counts in bit-operations when it stays float: the model's own (an image arrives in bytes), others.
IMAGE_BITS, FLOAT_BITS = 8, 32

logger = logging.getLogger(__name__)


class Budget(ABC):
    """One or more limits on the finished model; join budgets with ``&``."""

    @property
    def parts(self) -> tuple[Budget, ...]:
        """The budgets that were joined; a single one is its only part."""
        return (self,)

    def __and__(self, other: Budget) -> Budget:
        """All limits of both."""
        if not isinstance(other, Budget):
            return NotImplemented
        return _Joint((*self.parts, *other.parts))

    def limits(self, model: nn.Module) -> list[Limit]:
        """The limits as cost forms of a prepared model.

        Args:
            model: a prepared model; its fixed bit-widths are taken as they are now.

        Returns:
            One :class:`Limit` for each number that is limited.

        Raises:
            OrderError: if the model is not prepared.
            BudgetError: if an average is asked for over no tensors.
            ConfigError: if two parts limit the same thing.
        """
        found: dict[str, Limit] = {}
        for limit in self._limits(model):
            if limit.name in found:
                raise ConfigError(
                    f"Budget: expected one limit on {limit.name}, found two ({found[limit.name].target:g} and "
                    f"{limit.target:g} {limit.unit}). Leave one out."
                )
            found[limit.name] = limit
        return list(found.values())

    @abstractmethod
    def _limits(self, model: nn.Module) -> list[Limit]: ...

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"parts": [{"kind": type(part).__name__, **vars(part)} for part in self.parts]}


class _Joint(Budget):
    def __init__(self, parts: tuple[Budget, ...]) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Budget, ...]:
        return self._parts

    def _limits(self, model: nn.Module) -> list[Limit]:
        return [limit for part in self.parts for limit in part._limits(model)]

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


@dataclass(frozen=True)
class AverageBits(Budget):
    """Average bit-width, separately of weights and of activations.

    sum N b / sum N over the weights, each tensor once however many layers share it, first and last layer included,
    without embedding tables, which are looked up, unless a layer multiplies with one, too; and
    sum M b / sum M over the layers' inputs, M the elements for one sample, **without the model's own input**, which has
    the bits of its source (an image has 8). Layers and inputs that stay float are counted in neither.

    Paper: the average-bit objective, Q12 in the paper map.

    Args:
        weights: average over weights, bits; None leaves them free.
        activations: average over activations, bits; None leaves them free.
        mode: ``"bound"``, at most this; ``"target"``, as near as whole bits allow (the paper), and still not above.

    Raises:
        ConfigError: if both are None or a number is not above 0.

    Example:
        >>> AverageBits(weights=4, activations=4) & ModelSize("1.2 MB")
        AverageBits(weights=4, activations=4, mode='bound') & ModelSize(size='1.2 MB', mode='bound')
    """

    weights: float | None = None
    activations: float | None = None
    mode: Mode = "bound"

    def __post_init__(self) -> None:
        """Refuse numbers that no average can be."""
        _check_mode(self)
        if self.weights is None and self.activations is None:
            raise ConfigError("AverageBits: expected weights, activations or both, found neither. Give one.")
        for name in ("weights", "activations"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"AverageBits({name}=): expected bits above 0, found {value}. Give a number like 4.")

    def _limits(self, model: nn.Module) -> list[Limit]:
        rows = layer_table(model)
        table = BitTable(rows)
        limits = []
        if self.weights is not None:
            stored = stored_rows(rows)
            counts = {row.weight: row.spec.weight_count for row in stored if not row.spec.is_table}
            weights = sum(counts.values())
            share = f"{weights / parameter_count(model, rows):.1%} of all parameters"
            what = f"over {weights:,} weights in {len(counts)} tensors, {share}, first and last layer included"
            if len(counts) < len(stored):
                what += f", {len(stored) - len(counts)} embedding tables not"
            limits.append(average_limit("weight", self.weights, self.mode, table, list(counts.items()), what))
        if self.activations is not None:
            found = activation_counts(rows)
            if not any(count for _, count in found):
                raise BudgetError(
                    f"{type(model).__name__}: expected an input to average activation bits over, found that none but "
                    "the model's own is quantized. Leave activations= out, or quantize inputs."
                )
            hidden = sum(row.input is not None and not row.spec.is_input for row in rows)
            total = sum(count for _, count in found)
            what = f"over {total:,} inputs of {hidden} layers per sample, the last included, the model's own input not"
            what += ", keys and values of attention included" if any(row.spec.is_product for row in rows) else ""
            limits.append(average_limit("activation", self.activations, self.mode, table, found, what))
        return limits


@dataclass(frozen=True)
class ModelSize(Budget):
    """Bytes of the saved file.

    What does not depend on bits (names, scales, float tensors, header) plus sum ceil(N / 8) b over the weights, each
    stored as b bit-planes; first and last layer included, embedding tables, too.

    Args:
        size: bytes, or text with a unit: ``"1.2 MB"`` (10^6), ``"1.2 MiB"`` (2^20), ``"900 kB"``.
        mode: as for :class:`AverageBits`.

    Raises:
        ConfigError: if the size cannot be read or is not above 0.
    """

    size: int | float | str
    mode: Mode = "bound"

    def __post_init__(self) -> None:
        """Refuse a size that cannot be read."""
        _check_mode(self)
        self.bytes  # noqa: B018  (read for its error)

    @property
    def bytes(self) -> int:
        """The size in bytes, rounded down."""
        return whole_amount(self.size, "ModelSize", "B|byte|bytes", "'1.2 MB'")

    def _limits(self, model: nn.Module) -> list[Limit]:
        rows = layer_table(model)
        table = BitTable(rows)
        planes = [(row.weight, -(-row.spec.weight_count // 8)) for row in stored_rows(rows)]
        form = cost_form(table, planes, constant=fixed_bytes(model))
        accounting = f"the whole file, of which {int(form.constant):,} do not depend on bits"
        return [Limit("model size", "byte", self.bytes, self.mode, form, 1, accounting)]


@dataclass(frozen=True)
class BitOps(Budget):
    """Bit-operations of one forward for one sample.

    sum MACs * weight bits * input bits over the quantized layers, first and last included. An input that stays float
    counts 8 bits if it is the model's own (an image arrives in bytes), else 32.

    Paper: the BOPs objective, B3 and Q13 in the paper map.

    Args:
        operations: single bit-operations, or text with a prefix: ``"5.3 G"`` is 5.3e9.
        mode: as for :class:`AverageBits`.

    Raises:
        ConfigError: if the number cannot be read or is not above 0.
    """

    operations: int | float | str
    mode: Mode = "bound"

    def __post_init__(self) -> None:
        """Refuse a number that cannot be read."""
        _check_mode(self)
        self.count  # noqa: B018  (read for its error)

    @property
    def count(self) -> int:
        """The limit in single bit-operations, rounded down."""
        return whole_amount(self.operations, "BitOps", "BOP|BOPs", "'5.3 G'")

    def _limits(self, model: nn.Module) -> list[Limit]:
        rows = layer_table(model)
        table = BitTable(rows)
        product = [(row.input, row.spec.macs) for row in rows if row.input is not None]
        unquantized = [row for row in rows if row.input is None]
        weight = [(r.weight, r.spec.macs * (IMAGE_BITS if r.spec.is_input else FLOAT_BITS)) for r in unquantized]
        form = cost_form(table, weight, product=product)
        accounting = (
            f"per sample over {sum(not row.spec.is_table for row in rows)} layers, first and last included; "
            f"a float input counts {IMAGE_BITS} bits if it is the model's own, else {FLOAT_BITS}"
        )
        return [Limit("bit-operations", "BOP", self.count, self.mode, form, 1, accounting)]


def check_feasible(model: nn.Module, budget: Budget) -> list[FeasibleRange]:
    """Refuse a budget that no allowed bit-widths can keep; the ranges are logged.

    A bound is possible if the fewest bits keep it; a target if it lies between the costs of the fewest and the most
    bits. Costs grow with every bit-width, so joined bounds are possible together if each one is.

    Args:
        model: a prepared model.
        budget: the budget.

    Returns:
        The range of each limit.

    Raises:
        BudgetError: naming the range, its unit and what to do.
        OrderError: if the model is not prepared.
        ConfigError: if it is no budget.
    """
    if not isinstance(budget, Budget):
        raise ConfigError(
            f"expected a budget, found {budget!r}. Give one such as nipq.AverageBits(weights=4) or "
            "nipq.ModelSize('1.2 MB')."
        )
    rows = layer_table(model)
    ranges = []
    for limit in budget.limits(model):
        found = feasible_range(limit, rows)
        logger.info("%s", found)
        ranges.append(found)
        low, high = exact_range(limit, BitTable(rows))
        if not limit.allows(low):
            what = "Raise it, allow fewer bits in nipq.Config, or fix fewer bit-widths."
        elif limit.mode == "target" and high < Fraction(str(limit.target)):
            what = 'Lower it, allow more bits in nipq.Config, or ask for mode="bound".'
        else:
            continue
        raise BudgetError(
            f"{type(model).__name__}: expected {limit.name} within {found.low:,.10g} to {found.high:,.10g} "
            f"{limit.unit}, which is what the allowed bit-widths can reach; found {limit.target:,.10g}. {what}"
        )
    return ranges


def costs(model: nn.Module, budget: Budget) -> list[LimitCost]:
    """Costs of a prepared model now under each limit, with continuous and with rounded bit-widths.

    Raises:
        OrderError: if the model is not prepared.
        NonFiniteError: if a bit-width is not finite.
    """
    table = BitTable(layer_table(model))
    return [limit_cost(limit, table) for limit in budget.limits(model)]


def _check_mode(budget: AverageBits | ModelSize | BitOps) -> None:
    if budget.mode not in ("bound", "target"):
        raise ConfigError(f"{type(budget).__name__}: expected mode 'bound' or 'target', found {budget.mode!r}.")
