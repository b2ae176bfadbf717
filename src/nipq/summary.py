"""The per-layer table of a prepared model, at any moment."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from nipq.layer_table import LayerRow, layer_table

#: Bits that an input counts which stays float.
FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a :class:`Summary`; bits are the whole numbers that evaluation uses.

    Attributes:
        name: full name of the layer.
        kind: class name.
        weight_bits: bit-width of the weight.
        weight_bits_soft: the learned, continuous one; equal to ``weight_bits`` once frozen.
        activation_bits: bit-width of the input, None when it stays float.
        activation_bits_soft: the learned, continuous one.
        weight_alpha: mean boundary of the weight, units of the weight.
        activation_alpha: boundary of the input, units of the input.
        grid: grid of the input, ``"float"`` when it stays float.
        macs: multiply-accumulates per sample.
        weight_count: elements of the weight.
        activation_count: elements of the input per sample.
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
    """Per-layer table with totals; prints itself.

    Attributes:
        layers: one entry per prepared layer.
        weight_bits: average over all weights, each counted once.
        activation_bits: average over all inputs but the model's own, the paper's accounting.
        activation_bits_with_input: average over all inputs, the model's own included.
        weight_payload_bytes: bytes of the weights' bit-planes, without scales and header.
        bops: bit-operations per sample.
    """

    layers: tuple[LayerSummary, ...]
    weight_bits: float
    activation_bits: float | None
    activation_bits_with_input: float | None
    weight_payload_bytes: int
    bops: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The table that ``print`` shows, for a rich console."""
        table = Table(title=self._title(), title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("kind", "grid"):
            table.add_column(heading)
        for heading in ("W bits", "A bits", "W alpha", "A alpha", "weights", "inputs", "MMAC", "MBOP"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                layer.kind,
                layer.grid,
                _bits(layer.weight_bits, layer.weight_bits_soft),
                "float" if layer.activation_bits is None else _bits(layer.activation_bits, layer.activation_bits_soft),
                f"{layer.weight_alpha:.3g}",
                "-" if layer.activation_alpha is None else f"{layer.activation_alpha:.3g}",
                f"{layer.weight_count:,}",
                f"{layer.activation_count:,}",
                f"{layer.macs / 1e6:.3f}",
                f"{layer.bops / 1e6:.2f}",
            )
        return table

    def _title(self) -> str:
        inputs = "inputs float"
        if self.activation_bits is not None and self.activation_bits_with_input is not None:
            inputs = f"{self.activation_bits:.3f} over inputs ({self.activation_bits_with_input:.3f} with the model's)"
        return (
            f"{len(self.layers)} layers, first and last included; average bits: {self.weight_bits:.3f} over weights, "
            f"{inputs}; {self.weight_payload_bytes:,} bytes of weights; {self.bops / 1e9:.4f} GBOP"
        )

    def __str__(self) -> str:
        """The table as plain text, 160 columns at most."""
        text = io.StringIO()
        Console(file=text, width=160, color_system=None).print(self.table())
        return text.getvalue()


def _bits(whole: int, soft: float | None) -> str:
    return f"{whole}" if soft is None or abs(soft - whole) < 1e-6 else f"{whole} ({soft:.2f})"


def summary(model: nn.Module) -> Summary:
    """What every layer's bit-widths, boundaries and costs are now.

    Args:
        model: a prepared model.

    Returns:
        A :class:`Summary` of the whole bit-widths that evaluation uses.

    Raises:
        OrderError: if the model is not prepared.
    """
    rows = layer_table(model)
    layers = tuple(_layer(row) for row in rows)
    weights = {row.weight: layer for row, layer in zip(rows, layers, strict=True)}.values()
    hidden = [layer for layer in layers if not layer.is_input]
    return Summary(
        layers=layers,
        weight_bits=sum(w.weight_bits * w.weight_count for w in weights) / sum(w.weight_count for w in weights),
        activation_bits=_average_activation_bits(hidden),
        activation_bits_with_input=_average_activation_bits(list(layers)),
        weight_payload_bytes=sum(w.weight_bits * -(-w.weight_count // 8) for w in weights),
        bops=sum(layer.bops for layer in layers),
    )


def _average_activation_bits(layers: list[LayerSummary]) -> float | None:
    counted = [(layer.activation_bits, layer.activation_count) for layer in layers if layer.activation_bits is not None]
    total = sum(count for _, count in counted)
    return sum(bits * count for bits, count in counted) / total if total else None


def _layer(row: LayerRow) -> LayerSummary:
    weight_bits = row.weight.bits_rounded
    activation_bits = None if row.input is None else row.input.bits_rounded
    # The image arrives in bytes, so a float first input counts 8 bits; any other float input counts as float.
    counted = activation_bits if activation_bits is not None else (8 if row.spec.is_input else FLOAT_BITS)
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
        activation_count=row.spec.activation_count,
        bops=row.spec.macs * weight_bits * counted,
        is_input=row.spec.is_input,
        frozen=row.weight.is_frozen and (row.input is None or row.input.is_frozen),
    )
