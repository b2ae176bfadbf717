"""``nipq.inspect``: layers of a float model, parts that stay float, and budgets within reach, before preparation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import nn

from nipq.budget.bit_table import BitTable, exact_range
from nipq.budget.budget import AverageBits, BitOps, ModelSize, stored_rows
from nipq.config import BitRange, Config
from nipq.errors import Diagnostic
from nipq.export.onnx_write import promised_bytes
from nipq.functional.grid import GridKind
from nipq.nn.layers import LayerSpec
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import ExampleInputs, copy_of
from nipq.prepare.layer_table import LayerRow, layer_table
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import try_preparing
from nipq.qat.calibrate import calibrate_
from nipq.tables import Column, FittedTable, Prose, plain_text

#: Uniform bit-widths that each budget is shown for.
UNIFORM = (8, 6, 4, 3, 2)
#: Share of the parameters that budgets cover, below which the text names the largest ones that none covers.
HIGH_COVERAGE = 0.9


@dataclass(frozen=True)
class LayerFacts:
    """One layer that would be quantized.

    Attributes:
        spec: name, class and counts per sample.
        weight_bits: allowed bit-widths of the weight.
        weight_grid: kind of the weight's grid.
        input_bits: allowed bit-widths of the input, empty when it stays float.
        ranges: how many clipping ranges the weight has.
        shares_weight_with: the layer whose weight it shares and that comes first, or None.
    """

    spec: LayerSpec
    weight_bits: tuple[int, ...]
    weight_grid: GridKind
    input_bits: tuple[int, ...]
    ranges: int
    shares_weight_with: str | None


@dataclass(frozen=True)
class BudgetRange:
    """Costs under one kind of budget that the allowed bit-widths can reach.

    Attributes:
        name: name of the cost.
        unit: of all numbers here.
        low: with the fewest bits everywhere.
        high: with the most bits everywhere.
        uniform: at each uniform bit-width, every tensor as near to it as its allowed bits come (fixed ones stay).
        accounting: what is counted, in words.
    """

    name: str
    unit: str
    low: float
    high: float
    uniform: dict[int, float]
    accounting: str


@dataclass(frozen=True)
class Inspection:
    """Result of :func:`inspect`; prints as tables.

    Attributes:
        layers: the layers that would be quantized, in order of execution; empty if ``prepare_`` would refuse.
        findings: refusals, what stays float, and notes, each with a reason.
        ranges: for each kind of budget, what is within reach; empty if ``prepare_`` would refuse.
        policy: how first and last layer are treated and counted, one line.
        weights: elements of quantized weights, each tensor once.
        macs: multiply-accumulates of quantized layers per sample.
        parameters: elements of all parameters.
        float_bytes: bytes of all parameters and buffers as they are.
        coverage: share of the parameters whose bit-widths budgets cover, ``weights / parameters``.
        largest_float: the largest parameters that no budget covers, name -> elements, three at most.
    """

    layers: tuple[LayerFacts, ...]
    findings: tuple[Diagnostic, ...]
    ranges: tuple[BudgetRange, ...]
    policy: str
    weights: int
    macs: int
    parameters: int
    float_bytes: int
    coverage: float
    largest_float: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def tables(self) -> list[FittedTable]:
        """The tables that ``print`` shows, for a rich console; empty ones are left out."""
        return [table for table in (self._layers(), self._findings(), self._ranges()) if table.rows]

    def __rich__(self) -> RenderableType:
        """Totals, tables and the policy, for a rich console of any width."""
        totals = (
            f"{len(self.layers)} layers to quantize: {self.weights:,} weights, {self.macs / 1e6:,.1f} MMAC per sample. "
            f"Budgets cover these weights: {self.coverage:.1%} of the float model's {self.parameters:,} parameters "
            f"({self.float_bytes:,} bytes with buffers)."
        )
        if self.coverage < HIGH_COVERAGE and self.largest_float:
            named = ", ".join(f"{name} ({count:,})" for name, count in self.largest_float.items())
            totals += f" The largest that stay float: {named}."
        return Group(Prose(totals), *self.tables(), Prose(self.policy))

    def __str__(self) -> str:
        """Totals, tables and the policy as plain text, 80 columns at most."""
        return plain_text(self)

    def _layers(self) -> FittedTable:
        table = FittedTable(
            Column("layer", least=40),
            Column("kind", rank=2, least=12),
            Column("W bits"),
            Column("A bits"),
            Column("weights", rank=1),
            Column("inputs", rank=4),
            Column("MMAC", rank=3),
            Column("folds", rank=5, least=24),
            title="Layers",
        )
        for layer in self.layers:
            spec = layer.spec
            table.add_row(
                spec.name + (f" = {layer.shares_weight_with}" if layer.shares_weight_with else ""),
                spec.kind if spec.form == "plain" else f"{spec.kind} ({spec.form})",
                _choices(layer.weight_bits) + _levels(layer) + (f" x{layer.ranges}" if layer.ranges > 1 else ""),
                "-" if spec.is_table else _choices(layer.input_bits) + (" (image)" if spec.is_input else ""),
                f"{spec.weight_count:,}",
                f"{spec.activation_count:,}",
                f"{spec.macs / 1e6:.3f}",
                spec.batchnorm or "-",
            )
        return table

    def _findings(self) -> FittedTable:
        """Findings with one reason share a row: a network has dozens of residual adds."""
        columns = Column("what", least=5), Column("why", least=30), Column("where", least=20)
        table = FittedTable(*columns, title="Refused, float, or worth knowing")
        groups: dict[tuple[str, str], list[str]] = {}
        for found in self.findings:
            why = f"{found.reason}. {found.remedy}".rstrip(" .")
            groups.setdefault((found.severity, why), []).append(found.name or "the model")
        for (severity, why), names in groups.items():
            table.add_row(severity, why, ", ".join(names))
        return table

    def _ranges(self) -> FittedTable:
        """A column for each budget: its name is long, and its numbers are."""
        headings = [
            f"{found.name} [{'GBOP' if found.unit == 'BOP' else found.unit}]".replace(" ", "\n").replace("-", "-\n")
            for found in self.ranges
        ]
        table = FittedTable(Column("bits", least=7), *map(Column, headings), title="Budgets within reach")
        for label in ("lowest", "highest", *UNIFORM):
            numbers = (
                found.uniform[label] if isinstance(label, int) else {"lowest": found.low, "highest": found.high}[label]
                for found in self.ranges
            )
            cells = (
                f"{number / 1e9:,.4g}" if found.unit == "BOP" else f"{number:,.10g}"
                for number, found in zip(numbers, self.ranges, strict=True)
            )
            table.add_row(f"all {label}" if isinstance(label, int) else label, *cells)
        return table


def inspect(
    model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None, *, onnx: bool = False
) -> Inspection:
    """Report a float model's layers, what would stay float, and the budgets within reach; the model is not changed.

    Args:
        model: a float model.
        example_inputs: as for ``prepare_``.
        config: as for ``prepare_``.
        onnx: promise the bytes of ONNX files, too, plain and packed: several exports. They hold for the kinds of grid
            that the example inputs choose, so give a batch of real data.

    Returns:
        Layers, what stays float and why, and the range of each kind of budget.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs, or no layer is left to quantize.
        ConfigError: if a rule matches no layer, or an ONNX file is to be promised of a model that torch cannot export.
        MissingDependencyError: if an ONNX file is to be promised without the packages that write it.

    Example:
        >>> found = inspect(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
        >>> found.weights, found.macs, [layer.spec.name for layer in found.layers]
        (8, 8, ['0'])
    """
    findings, prepared = try_preparing(model, example_inputs, config)
    rows: list[LayerRow] = []
    ranges: list[BudgetRange] = []
    if not any(finding.severity == "error" for finding in findings):
        prepared = prepared or prepare_(copy_of(model), example_inputs, config)  # which says what there is not
        rows = layer_table(prepared)
        ranges = _ranges(prepared, rows)
        if onnx:
            ranges += _onnx_ranges(prepared, rows, example_inputs)
    first: dict[TensorQuantizer, str] = {}
    for row in rows:
        first.setdefault(row.weight, row.name)
    parameters = list(model.parameters())
    weights = sum(row.spec.weight_count for row in stored_rows(rows))
    elements = sum(parameter.numel() for parameter in parameters)
    covered = {model.get_submodule(row.name).weight for row in stored_rows(rows)}
    rest = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter not in covered}
    return Inspection(
        layers=tuple(_facts(row, first[row.weight]) for row in rows),
        findings=tuple(findings),
        ranges=tuple(ranges),
        policy=_policy(rows),
        weights=weights,
        macs=sum(row.spec.macs for row in rows),
        parameters=elements,
        float_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *model.buffers())),
        coverage=weights / elements if elements else 0.0,
        largest_float=dict(sorted(rest.items(), key=lambda item: -item[1])[:3]),
    )


def _levels(layer: LayerFacts) -> str:
    """Levels of the weight, where they are not the symmetric ones."""
    return f" {layer.weight_grid}" if layer.weight_grid in ("balanced", "full") else ""


def _facts(row: LayerRow, first: str) -> LayerFacts:
    return LayerFacts(
        spec=row.spec,
        weight_bits=row.weight.bit_range.choices,
        weight_grid=row.weight.grid.kind,
        input_bits=() if row.input is None else row.input.bit_range.choices,
        ranges=row.weight.alpha_raw.numel(),
        shares_weight_with=None if first == row.name else first,
    )


def _ranges(model: nn.Module, rows: Sequence[LayerRow]) -> list[BudgetRange]:
    # The numbers limited to do not matter: only the cost forms are looked at.
    hidden = any(row.input is not None and not row.spec.is_input for row in rows)
    budget = AverageBits(weights=1, activations=1 if hidden else None) & ModelSize(1) & BitOps(1)
    table = BitTable(rows)
    count = len(table.weights)
    found = []
    for limit in budget.limits(model):
        low, high = (float(end) for end in exact_range(limit, table))
        uniform = {n: float(limit.exact_cost(bits[:count], bits[count:])) for n, bits in _uniform(table).items()}
        found.append(BudgetRange(limit.name, limit.unit, low, high, uniform, limit.accounting))
    return found


def _uniform(table: BitTable) -> dict[int, tuple[int, ...]]:
    """Each of UNIFORM -> the allowed bit-widths nearest to it, one for each tensor of the table."""
    nearest = {n: table.round(torch.full((len(table.choices),), float(n), dtype=torch.float64)) for n in UNIFORM}
    return {n: tuple(int(bits) for bits in found.tolist()) for n, found in nearest.items()}


def _onnx_ranges(model: nn.Module, rows: Sequence[LayerRow], example_inputs: ExampleInputs) -> list[BudgetRange]:
    if not isinstance(example_inputs, (torch.Tensor, Mapping)):  # calibration takes several inputs by name
        forward = signature(model.forward)
        example_inputs = dict(forward.bind(*example_inputs).arguments)
    calibrate_(model, [example_inputs])
    table = BitTable(rows)
    found = []
    for name, pack in (("ONNX file", False), ("ONNX file, packed", True)):

        @cache
        def promised(*bits: int, pack: bool = pack) -> float:
            for quantizer, width in zip(table.quantizers, bits, strict=True):
                quantizer.freeze_bits_(width)
            return float(promised_bytes(model, example_inputs, pack=pack))

        low, high = (promised(*map(pick, table.choices)) for pick in (min, max))
        uniform = {n: promised(*bits) for n, bits in _uniform(table).items()}
        found.append(BudgetRange(name, "bytes", low, high, uniform, "to the byte, with the grids of these inputs"))
    return found


def _policy(rows: Sequence[LayerRow]) -> str:
    if not rows:
        return "Nothing would be quantized: see what is refused."

    def bits(row: LayerRow) -> str:
        reads = "float" if row.input is None else _choices(row.input.bit_range.choices)
        return f"{row.name}: weight {_choices(row.weight.bit_range.choices)}, input {reads}"

    multiplying = [row for row in rows if not row.spec.is_table and not row.spec.is_product]
    tables = "" if not any(row.spec.is_table for row in rows) else " Embedding tables count in the model's size alone."
    return (
        f"First and last layer count in every average and cost ({bits(multiplying[0])}; {bits(multiplying[-1])}). "
        f"The model's own input counts in bit-operations with its bits, and in no average.{tables}"
    )


def _choices(choices: tuple[int, ...]) -> str:
    """Allowed bit-widths in a few characters: ``2..8``, ``2,4,8``, ``4``."""
    if not choices:
        return "float"
    whole = BitRange(allowed=choices)
    return f"{whole.min}..{whole.max}" if whole.allowed is None and len(choices) > 1 else ",".join(map(str, choices))
