"""``nipq.summary``: bit-widths, clipping ranges and costs of a prepared model, layer by layer, at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from torch import nn

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import (
    FLOAT_BITS,
    IMAGE_BITS,
    AverageBits,
    BitOps,
    Budget,
    activation_counts,
    parameter_count,
    stored_rows,
)
from nipq.functional.packing import payload_bytes
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow, layer_table
from nipq.tables import Column, FittedTable, Prose, plain_text


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a :class:`Summary`; bits are the whole numbers that evaluation uses.

    Attributes:
        name: full name of the layer.
        kind: class name.
        weight_bits: bit-width of the weight; of a product inside attention, that of key or value.
        weight_bits_soft: the learned, continuous one; equal to ``weight_bits`` once frozen.
        activation_bits: bit-width of the input, None when it stays float.
        activation_bits_soft: the learned, continuous one.
        weight_alpha: mean clipping range (alpha) of the weight, units of the weight.
        activation_alpha: clipping range (alpha) of the input, units of the input.
        grid: grid of the input, ``"float"`` when it stays float.
        macs: multiply-accumulates per sample.
        weight_count: elements of the weight.
        activation_count: elements of the input per sample; of a product inside attention, of both operands.
        bops: bit-operations per sample.
        is_input: whether the layer reads the model's own input.
        frozen: whether both bit-widths are fixed.
    """

    name: str
    kind: str
    weight_bits: int
    weight_bits_soft: float
    activation_bits: int | None
    activation_bits_soft: float | None
    weight_alpha: float
    activation_alpha: float | None
    grid: str
    macs: int
    weight_count: int
    activation_count: int
    bops: int
    is_input: bool
    frozen: bool


@dataclass(frozen=True)
class Summary:
    """Per-layer table with totals; prints as a table.

    Attributes:
        layers: one entry per prepared layer.
        weight_bits: average over the weights of layers that multiply, each counted once.
        activation_bits: average over all inputs but the model's own, the paper's accounting.
        activation_bits_with_input: average over all inputs, the model's own included.
        weight_payload_bytes: bytes of the weights' bit-planes, without scales and header.
        bops: bit-operations per sample.
        parameters: elements of the model's own parameters, without those of quantizers.
        coverage: share of these whose bit-widths budgets cover, 0 to 1.
    """

    layers: tuple[LayerSummary, ...]
    weight_bits: float
    activation_bits: float | None
    activation_bits_with_input: float | None
    weight_payload_bytes: int
    bops: int
    parameters: int
    coverage: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def table(self) -> FittedTable:
        """The table of the layers, for a rich console; it shows as many columns as fit."""
        table = FittedTable(
            Column("layer", least=40),
            Column("kind", rank=5, least=12),
            Column("grid", rank=6, least=8),
            Column("W bits"),
            Column("A bits"),
            Column("W alpha", rank=9),
            Column("A alpha", rank=8),
            Column("weights", rank=2),
            Column("inputs", rank=7),
            Column("MMAC", rank=4),
            Column("MBOP", rank=3),
        )
        for layer in self.layers:
            table.add_row(
                layer.name,
                layer.kind,
                layer.grid,
                _bits(layer.weight_bits, layer.weight_bits_soft),
                _input_bits(layer),
                f"{layer.weight_alpha:.3g}",
                "-" if layer.activation_alpha is None else f"{layer.activation_alpha:.3g}",
                f"{layer.weight_count:,}",
                f"{layer.activation_count:,}",
                f"{layer.macs / 1e6:.3f}",
                f"{layer.bops / 1e6:.2f}",
            )
        return table

    def _totals(self) -> str:
        inputs = "all inputs float"
        if self.activation_bits_with_input is not None:
            without = "none" if self.activation_bits is None else f"{self.activation_bits:.3f}"
            inputs = f"{without} over inputs ({self.activation_bits_with_input:.3f} with the model's own)"
        return (
            f"{len(self.layers)} layers, first and last included; average bits: {self.weight_bits:.3f} over weights, "
            f"{inputs}; {self.weight_payload_bytes:,} bytes of weights; {self.bops / 1e9:.4f} GBOP. "
            f"Budgets cover {self.coverage:.1%} of {self.parameters:,} parameters."
        )

    def __rich__(self) -> RenderableType:
        """Totals and table, for a rich console of any width."""
        return Group(Prose(self._totals()), self.table())

    def __str__(self) -> str:
        """Totals and table as plain text, 80 columns at most."""
        return plain_text(self)


def _input_bits(layer: LayerSummary) -> str:
    if layer.activation_bits is None:
        return "float" if layer.macs else "-"  # a table reads numbers of rows
    return _bits(layer.activation_bits, layer.activation_bits_soft)


def _bits(whole: int, soft: float | None) -> str:
    return f"{whole}" if soft is None or abs(soft - whole) < 1e-6 else f"{whole} ({soft:.2f})"


def summary(model: nn.Module) -> Summary:
    """Bit-widths, clipping ranges and costs of every layer as they are now.

    Args:
        model: a prepared model.

    Returns:
        A :class:`Summary` of the whole bit-widths that evaluation uses.

    Raises:
        OrderError: if the model is not prepared.

    Example:
        >>> import torch
        >>> from nipq.prepare.prepare import prepare_
        >>> found = summary(prepare_(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4)))
        >>> found.weight_bits, found.bops
        (5.0, 320)
    """
    rows = layer_table(model)
    table = BitTable(rows)
    bits = {quantizer: quantizer.bits_rounded for quantizer in table.quantizers}
    weights, inputs = [bits[quantizer] for quantizer in table.weights], [bits[quantizer] for quantizer in table.inputs]

    def exact(budget: Budget) -> float:
        (limit,) = budget.limits(model)  # the target is not looked at
        return float(limit.exact_cost(weights, inputs))

    counts = activation_counts(rows)
    parameters, stored = parameter_count(model, rows), stored_rows(rows)
    own = [(row.input, row.spec.activation_count) for row in rows if row.input is not None and row.spec.is_input]
    return Summary(
        layers=tuple(_layer(row) for row in rows),
        weight_bits=exact(AverageBits(weights=1)),
        activation_bits=exact(AverageBits(activations=1)) if any(count for _, count in counts) else None,
        activation_bits_with_input=_average([*counts, *own]) if counts else None,
        weight_payload_bytes=sum(payload_bytes(row.spec.weight_count, row.weight.bits_rounded) for row in stored),
        bops=int(exact(BitOps(1))),
        parameters=parameters,
        coverage=sum(row.spec.weight_count for row in stored) / parameters,
    )


def _average(counts: Sequence[tuple[TensorQuantizer, int]]) -> float:
    return sum(quantizer.bits_rounded * count for quantizer, count in counts) / sum(count for _, count in counts)


def _layer(row: LayerRow) -> LayerSummary:
    weight_bits = row.weight.bits_rounded
    activation_bits = None if row.input is None else row.input.bits_rounded
    float_bits = IMAGE_BITS if row.spec.is_input else FLOAT_BITS
    return LayerSummary(
        name=row.name,
        kind=row.spec.kind,
        weight_bits=weight_bits,
        weight_bits_soft=float(row.weight.bits.detach()),
        activation_bits=activation_bits,
        activation_bits_soft=None if row.input is None else float(row.input.bits.detach()),
        weight_alpha=float(row.weight.alpha.detach().mean()),
        activation_alpha=None if row.input is None else float(row.input.alpha.detach()),
        grid="float" if row.input is None else row.input.grid.kind,
        macs=row.spec.macs,
        weight_count=row.spec.weight_count,
        activation_count=row.spec.activation_count + row.spec.other_count,
        bops=row.spec.macs * weight_bits * (float_bits if activation_bits is None else activation_bits),
        is_input=row.spec.is_input,
        frozen=row.weight.is_frozen and (row.input is None or row.input.is_frozen),
    )
