"""How large an ONNX file will be, said before training.

A model before anything is done to it: its layers, what stays float and why, and which budgets are within reach.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import AverageBits, BitOps, ModelSize, exact_range, stored_rows
from nipq.config import BitRange, Config
from nipq.errors import Diagnostic, OrderError
from nipq.export.convert import deploy_copy
from nipq.export.modules import deployed_layers
from nipq.export.onnx_write import onnx_bytes, qonnx_bytes
from nipq.nn.layers import LayerSpec
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow, layer_table, quantizers
from nipq.prepare.prepare import prepare_
from nipq.prepare.trace import ExampleInputs
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_
from nipq.report.summary import plain_text


@torch.no_grad()
def promised_bytes(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pack: bool = False,
    format: Literal["onnx", "qonnx"] = "onnx",
) -> int:
    """Bytes of the ONNX file that ``nipq.export`` will write of this model at its present bit-widths.

    They follow from the graph, the bit-widths and the kinds of grid, and not from a number that training moves, so the
    promise of an untrained model holds for the trained one. To try bit-widths: ``nipq.set_bits_`` on a copy. The one
    exception: float tensors outside of the quantized layers that turn out equal, number by number, are stored once, and
    the file is smaller by the other.

    Args:
        model: a prepared and calibrated model (bits still learned count as evaluation rounds them), or a deployed one.
        example_inputs: as for ``nipq.export``.
        pack: as for ``nipq.export``.
        format: ``"onnx"`` or ``"qonnx"``.

    Returns:
        Bytes on disk.

    Raises:
        OrderError: if the model is neither prepared nor deployed, or not calibrated.
        ConfigError: if the model cannot be traced.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    twin = copy.deepcopy(model) if deployed_layers(model) else _deployed(model)
    _unlike(twin)
    if format == "qonnx":
        return len(qonnx_bytes(twin, example_inputs)[0])
    return len(onnx_bytes(twin, example_inputs, pack=pack)[0])


def _deployed(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model):
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated boundary, found none. Call nipq.calibrate_(model, loader): "
                "it chooses the grids, on which the size of an ONNX file depends."
            )
    return deploy_copy(model)


def _unlike(model: nn.Module) -> None:
    """Float pieces as training leaves them: no two parameters or running statistics equal, as fresh ones are."""
    layers = set(deployed_layers(model).values())
    draws = torch.Generator().manual_seed(0)
    for module in model.modules():
        if module in layers:
            continue
        found: list[Tensor | None] = list(module._parameters.values())
        if isinstance(module, _NormBase):
            found += [module.running_mean, module.running_var]
        for tensor in found:
            if tensor is not None and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draws) + 0.5)


#: Uniform bit-widths that each budget is shown for.
UNIFORM = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class LayerFacts:
    """One layer that would be quantized.

    Attributes:
        spec: name, class and counts per sample.
        weight_bits: allowed bit-widths of the weight.
        input_bits: allowed bit-widths of the input, empty when it stays float.
        boundaries: how many boundaries the weight has.
        shares_weight_with: the layer whose weight it shares and that comes first, or None.
    """

    spec: LayerSpec
    weight_bits: tuple[int, ...]
    input_bits: tuple[int, ...]
    boundaries: int
    shares_weight_with: str | None


@dataclass(frozen=True)
class BudgetRange:
    """What one kind of budget costs within reach of the allowed bit-widths.

    Attributes:
        name: what is limited.
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
    """What :func:`inspect` found; prints itself.

    Attributes:
        layers: the layers that would be quantized, in order of execution; empty if ``prepare_`` would refuse.
        findings: refusals, what stays float, and notes, each with a reason.
        ranges: for each kind of budget, what is within reach; empty if ``prepare_`` would refuse.
        policy: how first and last layer are treated and counted, one line.
        weights: elements of quantized weights, each tensor once.
        macs: multiply-accumulates of quantized layers per sample.
        parameters: elements of all parameters.
        float_bytes: bytes of all parameters and buffers as they are.
    """

    layers: tuple[LayerFacts, ...]
    findings: tuple[Diagnostic, ...]
    ranges: tuple[BudgetRange, ...]
    policy: str
    weights: int
    macs: int
    parameters: int
    float_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """The tables that ``print`` shows, for a rich console; empty ones are left out."""
        return [table for table in (self._layers(), self._findings(), self._ranges()) if table.row_count]

    def __str__(self) -> str:
        """Totals, tables and the policy as plain text."""
        totals = (
            f"{len(self.layers)} layers to quantize: {self.weights:,} weights, {self.macs / 1e6:,.1f} MMAC per sample; "
            f"the float model has {self.parameters:,} parameters and {self.float_bytes:,} bytes"
        )
        return plain_text(totals, *self.tables(), self.policy)

    def _layers(self) -> Table:
        table = _table("Layers", "layer", "kind", "W bits", "A bits", "weights", "inputs", "MMAC", "folds", text=2)
        for layer in self.layers:
            spec = layer.spec
            table.add_row(
                spec.name + (f" = {layer.shares_weight_with}" if layer.shares_weight_with else ""),
                spec.kind,
                _choices(layer.weight_bits) + (f" x{layer.boundaries}" if layer.boundaries > 1 else ""),
                "-" if spec.is_table else _choices(layer.input_bits) + (" (image)" if spec.is_input else ""),
                f"{spec.weight_count:,}",
                f"{spec.activation_count:,}",
                f"{spec.macs / 1e6:.3f}",
                spec.batchnorm or "-",
            )
        return table

    def _findings(self) -> Table:
        """Findings with one reason share a row: a network has dozens of residual adds."""
        table = _table("Refused, float, or worth knowing", "what", "why", "where", text=3)
        groups: dict[tuple[str, str], list[str]] = {}
        for found in self.findings:
            why = f"{found.reason}. {found.remedy}".rstrip(" .")
            groups.setdefault((found.severity, why), []).append(found.name or "the model")
        for (severity, why), names in groups.items():
            table.add_row(severity, why, ", ".join(names))
        return table

    def _ranges(self) -> Table:
        table = _table("Budgets within reach", "budget", "lowest", "highest", *(f"all {b}" for b in UNIFORM), text=1)
        for found in self.ranges:
            numbers = (found.low, found.high, *(found.uniform[bits] for bits in UNIFORM))
            giga = found.unit == "BOP"
            shown = [f"{number / 1e9:,.4g}" if giga else f"{number:,.10g}" for number in numbers]
            table.add_row(f"{found.name} [{'G' if giga else ''}{found.unit}]", *shown)
        return table


def inspect(
    model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None, *, onnx: bool = False
) -> Inspection:
    """Look at a model before anything is done to it; the model is not changed.

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
    findings = tuple(validate(model, example_inputs, config))
    rows: list[LayerRow] = []
    ranges: list[BudgetRange] = []
    if not any(finding.severity == "error" for finding in findings):
        prepared = prepare_(copy.deepcopy(model), example_inputs, config)
        rows = layer_table(prepared)
        ranges = _ranges(prepared, rows)
        if onnx:
            ranges += _onnx_ranges(prepared, rows, example_inputs)
    first: dict[TensorQuantizer, str] = {}
    for row in rows:
        first.setdefault(row.weight, row.name)
    parameters = list(model.parameters())
    return Inspection(
        layers=tuple(_facts(row, first[row.weight]) for row in rows),
        findings=findings,
        ranges=tuple(ranges),
        policy=_policy(rows),
        weights=sum(row.spec.weight_count for row in stored_rows(rows)),
        macs=sum(row.spec.macs for row in rows),
        parameters=sum(p.numel() for p in parameters),
        float_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *model.buffers())),
    )


def _facts(row: LayerRow, first: str) -> LayerFacts:
    return LayerFacts(
        spec=row.spec,
        weight_bits=row.weight.bit_range.choices,
        input_bits=() if row.input is None else row.input.bit_range.choices,
        boundaries=row.weight.alpha_raw.numel(),
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


def _table(title: str, *headings: str, text: int) -> Table:
    """A table whose first columns hold text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < text else "right", overflow="fold")
    return table
