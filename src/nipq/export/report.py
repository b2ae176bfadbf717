"""What an export wrote."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class ExportedLayer(NamedTuple):
    """One layer in a file.

    Attributes:
        name: full name in the model.
        weight_bits: bit-width of the weight.
        container: type that the weight's codes are stored as.
        input_bits: bit-width of the input, or None when it stays float.
    """

    name: str
    weight_bits: int
    container: str
    input_bits: int | None


class ExportedProduct(NamedTuple):
    """One product inside attention in a file.

    Attributes:
        name: full name in the model.
        x_bits: bit-width of the first operand, query or probability.
        y_bits: bit-width of the second one, key or value.
    """

    name: str
    x_bits: int
    y_bits: int


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; prints itself.

    Attributes:
        path: the file.
        format: ``"onnx"``, ``"qonnx"``, ``"arrays"`` or ``"program"``.
        bytes: size of the file.
        opset: version of ONNX's operators, or None.
        layers: the quantized layers.
        warnings: what a reader of this file should know.
        products: the quantized products inside attention.
    """

    path: Path
    format: str
    bytes: int
    opset: int | None
    layers: tuple[ExportedLayer, ...]
    warnings: tuple[str, ...] = ()
    products: tuple[ExportedProduct, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        layers, products = ([part._asdict() for part in parts] for parts in (self.layers, self.products))
        plain = {"path": str(self.path), "layers": layers, "warnings": list(self.warnings), "products": products}
        return asdict(self) | plain

    def table(self) -> Table:
        """Layers and products, for a rich console."""
        table = Table()
        table.add_column("layer", overflow="fold")
        for heading in ("W bits", "stored as", "A bits"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            inputs = "float" if layer.input_bits is None else str(layer.input_bits)
            table.add_row(layer.name or "(the model)", str(layer.weight_bits), layer.container, inputs)
        for product in self.products:
            table.add_row(product.name, "-", "-", f"{product.x_bits} x {product.y_bits}")
        return table

    def __str__(self) -> str:
        """File, layers and warnings as plain text."""
        text = io.StringIO()
        console = Console(file=text, width=120, color_system=None)
        opset = "" if self.opset is None else f", opset {self.opset}"
        heading = f"{self.path}: {self.format}{opset}, {self.bytes:,} bytes"
        console.print(heading, soft_wrap=True, markup=False)
        console.print(self.table())
        for warning in self.warnings:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False)
        return text.getvalue()
