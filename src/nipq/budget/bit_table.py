"""Every bit-width of a prepared model in one vector, and limits on what a choice of bit-widths costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from nipq.errors import NonFiniteError, OrderError
from nipq.functional.bitwidth import bits_from_raw
from nipq.functional.cost import CostForm, cost
from nipq.nn.parameters import QuantizerParameters
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow

Mode = Literal["bound", "target"]


class BitTable:
    """The tensors that have a bit-width, weights first and each once, and their bits as one vector.

    Built from the rows of :func:`nipq.prepare.layer_table.layer_table`. The vector is computed for all tensors
    together: one concatenation, one sigmoid, no value read back to the host.

    Args:
        rows: the prepared layers.

    Attributes:
        weights: weight quantizers; layers that share a weight share one. Keys and values stand for weights. Of those
            that share a bit-width, here and among inputs, the first stands for all.
        inputs: input quantizers, one for each layer whose input is quantized.
        weight_of_input: for each input, the place of its layer's weight quantizer in ``weights``.
        place: place of each tensor in the vector.
        choices: allowed bit-widths of each tensor, ascending; just one when frozen.
    """

    def __init__(self, rows: Sequence[LayerRow]) -> None:
        owned = [(_owner(row.weight), None if row.input is None else _owner(row.input)) for row in rows]
        weight_of = {own: weight for weight, own in reversed(owned) if own is not None}
        self.weights: tuple[TensorQuantizer, ...] = tuple(dict.fromkeys(weight for weight, _ in owned))
        self.inputs: tuple[TensorQuantizer, ...] = tuple(dict.fromkeys(own for _, own in owned if own is not None))
        self.place = {member: place for place, group in enumerate(self.members) for member in group}
        weights = [self.place[weight_of[own]] for own in self.inputs]
        self.weight_of_input = torch.tensor(weights, dtype=torch.int64)
        self.choices = tuple(
            (quantizer.bits_rounded,) if quantizer.is_frozen else quantizer.bit_range.choices
            for quantizer in self.quantizers
        )
        self._learned = [quantizer for quantizer in self.quantizers if not quantizer.is_frozen]
        learned = [place for place, quantizer in enumerate(self.quantizers) if not quantizer.is_frozen]
        widest = max(len(choices) for choices in self.choices)
        padded = [[*choices, *[choices[-1]] * (widest - len(choices))] for choices in self.choices]
        self._tensors = {
            "place": torch.tensor(learned, dtype=torch.int64),
            "low": torch.tensor([quantizer.bit_range.low for quantizer in self._learned]),
            "high": torch.tensor([quantizer.bit_range.high for quantizer in self._learned]),
            "choices": torch.tensor(padded, dtype=torch.float64),
        }
        self.to(self.quantizers[0].alpha_raw.device)

    @property
    def quantizers(self) -> tuple[TensorQuantizer, ...]:
        """All tensors' quantizers in the order of the vector: weights, then inputs."""
        return (*self.weights, *self.inputs)

    @property
    def members(self) -> tuple[tuple[QuantizerParameters, ...], ...]:
        """For each entry of the vector the tensors whose bit-width it is."""
        return tuple(tuple(quantizer.bit_group) for quantizer in self.quantizers)

    @property
    def device(self) -> torch.device:
        """Device of the vector."""
        return self._tensors["choices"].device

    def to(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}

    def bits(self) -> Tensor:
        """Bit-widths now, float64, shape (W + L,): continuous where learned, differentiable in every ``bit_raw``.

        Raises:
            OrderError: if a bit-width was frozen after this table was built.
        """
        bits = self._tensors["choices"][:, 0]
        if not self._learned:
            return bits
        try:
            raw = torch.cat([quantizer.bit_raw for quantizer in self._learned])
        except AttributeError:
            frozen = next(quantizer.name for quantizer in self._learned if quantizer.is_frozen)
            raise OrderError(
                f"{frozen}: expected a bit-width that is still learned, found one that was frozen since. "
                "A search ends when bits are frozen; build a new Search to go on with the others."
            ) from None
        # Ends as tensors instead of numbers: the same formula, for tensors of different ranges at once.
        low, high = self._tensors["low"], self._tensors["high"]
        learned = bits_from_raw(raw.float(), low, high)  # type: ignore[arg-type]  # see above
        return bits.index_copy(0, self._tensors["place"], learned.double())

    def round(self, bits: Tensor) -> Tensor:
        """Nearest allowed bit-widths (the lower of two that are equally near), with identity gradient.

        Args:
            bits: bit-widths, shape (W + L,).

        Returns:
            Whole numbers held as float64, shape of ``bits``.
        """
        choices = self._tensors["choices"]
        nearest = (choices - bits.detach()[:, None]).abs().argmin(1, keepdim=True)  # the first, that is lower, of two
        return choices.gather(1, nearest)[:, 0] + (bits - bits.detach())

    def split(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of weights, shape (W,), and bits of inputs, shape (L,): what :func:`nipq.functional.cost.cost` takes."""
        return bits[: len(self.weights)], bits[len(self.weights) :]

    def check_finite(self, bits: Tensor) -> None:
        """Refuse bit-widths that are not numbers (reads values: not for every step on a GPU).

        Args:
            bits: bit-widths, shape (W + L,).

        Raises:
            NonFiniteError: naming the first tensor whose bit-width is NaN or infinite.
        """
        if bool(torch.isfinite(bits).all()):
            return
        first = int(torch.isfinite(bits).logical_not().nonzero()[0, 0])
        raise NonFiniteError(
            f"{self.quantizers[first].name}: expected a finite bit-width, found {bits[first].item()}. "
            "Lower the learning rate of the bits, or look for a loss that is not finite before this step."
        )


def _owner(quantizer: TensorQuantizer) -> TensorQuantizer:
    owner = quantizer.bit_owner
    assert isinstance(owner, TensorQuantizer)
    return owner


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

    def exact_cost(self, weight_bits: Sequence[int | Fraction], activation_bits: Sequence[int | Fraction]) -> Fraction:
        """Cost of bit-widths without any rounding error, in ``unit``."""
        total: int | Fraction = self._whole(self.form.constant)
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
        """Return whether a cost is not above the limit; the limit is read as it is written, 4.1 is 41/10."""
        return cost <= Fraction(str(self.target))

    def _whole(self, coefficient: float) -> int:
        return round(coefficient * self.denominator)

    def __str__(self) -> str:
        """Name, target, unit and accounting on one line."""
        sign = "<=" if self.mode == "bound" else "->"
        return f"{self.name} {sign} {self.target:,.10g} {self.unit} ({self.accounting})"


@dataclass(frozen=True)
class LimitCost:
    """Cost of a model under one limit.

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
    """Cost of the model now under one limit.

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
