"""``nipq.export``: write a deployed model as a file for other programs, and report what the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from nipq.errors import ConfigError, FileFormatError, first_line
from nipq.export.arrays import arrays_bytes
from nipq.export.onnx_read import matched_layers, read_onnx
from nipq.export.onnx_write import FIXED_BATCH, onnx_bytes, qonnx_bytes
from nipq.export.program import call_arguments, program_bytes
from nipq.export.runtimes import faithful_session
from nipq.files import check_free, written_whole
from nipq.nn.deployed import Deployed, check_deployed, deployed_layers, deployed_products
from nipq.prepare.batches import BatchReader
from nipq.prepare.convert import bare_model
from nipq.prepare.input_form import REMEDY, ExampleInputs, known_form
from nipq.tables import Column, FittedTable, Prose, plain_text

#: Formats of files.
Format = Literal["onnx", "qonnx", "arrays", "program"]

#: Formats by the end of a file's name, the longest ends first.
SUFFIXES: dict[str, Format] = {".qonnx.onnx": "qonnx", ".onnx": "onnx", ".npz": "arrays", ".pt2": "program"}


def export(
    deployed: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    *,
    format: Format | None = None,
    pack: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write a deployed model as a file for other programs, whole or not at all.

    The integers and the input steps in the file are those that were trained. The documentation of ``export`` says what
    each format holds, and how equal the results of each runtime are.

    Args:
        deployed: a model from ``nipq.convert`` or ``nipq.load``; it is not changed.
        path: the file.
        example_inputs: the model's inputs: a tensor, a sequence of arguments, or a mapping by name. Values
            do not matter; the first dimension is the batch and stays open. A training batch will do: what the model
            was not prepared with, such as labels, is left out.
        format: ``"onnx"`` (QuantizeLinear, Clip, DequantizeLinear), ``"qonnx"`` (Quant nodes), ``"arrays"`` (NPZ) or
            ``"program"`` (``torch.export``); by the end of the path if not given: ``.onnx``, ``.qonnx.onnx``,
            ``.npz``, ``.pt2``.
        pack: ONNX only: store weights of up to 4 bits as INT4, and of 2 bits as INT2.
        overwrite: replace an existing file.

    Returns:
        A report of the file, which prints as a table.

    Raises:
        NotQuantizableError: if a layer has no form in the format.
        ConfigError: if the name is taken or says no format, the model is not deployed or cannot be traced, or the
            inputs are not those that it was prepared with.
        NonFiniteError: if a scale leaves the range of float32.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    path, deployed = Path(path), bare_model(deployed, "export")
    chosen = format_of(path) if format is None else format
    if chosen not in get_args(Format):
        raise ConfigError(f"export: expected one of the formats {', '.join(get_args(Format))}, found {chosen!r}.")
    if pack and chosen != "onnx":
        raise ConfigError(
            f"export: expected pack=True with the format 'onnx' only, found {chosen!r}. "
            "Leave it out; nipq.save writes the smallest file."
        )
    check_deployed(deployed, "export")
    check_free(path, overwrite=overwrite, command="export")
    if known_form(deployed) is not None:  # not of a model that was loaded into a float one
        example_inputs = _prepared_with(deployed, example_inputs)
    if chosen != "program":
        _check_float32(deployed, chosen)
    opset: int | None = None
    layers, products = deployed_layers(deployed), deployed_products(deployed)
    containers = {name: str(layer.weight_codes.dtype).removeprefix("torch.") for name, layer in layers.items()}
    warnings: tuple[str, ...] = ()
    if chosen == "onnx":
        data, opset, containers, warnings = onnx_bytes(deployed, example_inputs, pack=pack)
        if find_spec("onnxruntime") is not None:
            _check_runs(data, example_inputs)
    elif chosen == "qonnx":
        data, opset, containers, warnings = qonnx_bytes(deployed, example_inputs)
    elif chosen == "arrays":
        data, warnings = arrays_bytes(deployed, example_inputs)
    else:
        data, any_batch = program_bytes(deployed, example_inputs)
        warnings = () if any_batch else (FIXED_BATCH,)
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
        if chosen in ("onnx", "qonnx"):
            _check_layers(temporary, layers)
    return ExportReport(
        path,
        chosen,
        len(data),
        opset,
        tuple(
            ExportedLayer(name, layer.weight_bits, containers[name], getattr(layer, "input_bits", None))
            for name, layer in layers.items()
        ),
        warnings,
        tuple(ExportedProduct(name, product.x.bits, product.y.bits) for name, product in products.items()),
    )


def _check_layers(path: Path, layers: Mapping[str, Deployed]) -> None:
    """Refuse a file in which the exporter moved a layer's codes to where no reader, and no proof, finds them."""
    name = next(iter(layers))
    try:
        for found in matched_layers(read_onnx(path)):
            name = found.name
            if (getattr(layers[name], "input_step", None) is not None) != ("step of the input" in found.facts):
                raise FileFormatError(f"{name}: expected a quantized input, found none")
    except FileFormatError as error:
        reason = first_line(error).removeprefix(f"{path}: ")
        raise ConfigError(
            f"export: expected a model of which torch's exporter writes an ONNX file whose layers can be found, found "
            f"another one: {reason} Writing into an input or a weight inside of a layer's forward is often the "
            "reason; export a .pt2 program, or save it with nipq.save."
        ) from error


def _check_runs(data: bytes, example_inputs: ExampleInputs) -> None:
    """Refuse what the exporter wrote if ONNX Runtime cannot run it on the example."""
    try:
        session = faithful_session(data)
        args, kwargs = call_arguments(example_inputs)
        names = [value.name for value in session.get_inputs()]
        given = dict(zip(names, (value for value in args if isinstance(value, torch.Tensor)), strict=False)) | kwargs
        session.run(None, {name: given[name].numpy() for name in names})
    except Exception as error:  # the runtime's exceptions share no base class
        raise ConfigError(
            f"export: expected a model of which torch's exporter writes an ONNX file that runs, found one that ONNX "
            f"Runtime stops in: {first_line(error)}. Writing into views and slices of a tensor is often the reason; "
            "export a .pt2 program, or save it with nipq.save."
        ) from error


def _check_float32(deployed: nn.Module, format: Format) -> None:
    """Refuse a model that computes in another type, which these formats do not hold."""
    for name, layer in deployed_layers(deployed).items():
        if layer.like.dtype != torch.float32:
            raise ConfigError(
                f"{name}: expected a float32 model for the format {format!r}, found {layer.like.dtype}. Export "
                "nipq.convert(model).float(), which takes float32 inputs, or a .pt2 program, which keeps the type."
            )


def _prepared_with(deployed: nn.Module, given: ExampleInputs) -> ExampleInputs:
    """Inputs of the form that the model was prepared with, out of a training batch."""
    try:
        return BatchReader(deployed, purpose="export").inputs(given)
    except ConfigError as error:
        raise ConfigError(str(error).replace(REMEDY, "Give inputs that the model was prepared with.")) from error


def format_of(path: Path) -> Format:
    """The format that the end of a file's name stands for.

    Args:
        path: the file.

    Returns:
        The format.

    Raises:
        ConfigError: if it stands for none.

    Example:
        >>> format_of(Path("model.onnx")), format_of(Path("model.qonnx.onnx"))
        ('onnx', 'qonnx')
    """
    for suffix, found in SUFFIXES.items():
        if path.name.endswith(suffix):
            return found
    raise ConfigError(
        f"export: expected a name that ends in {', '.join(SUFFIXES)}, found {path.name!r}. Rename it, or name a format."
    )


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
    """Description of an exported file; prints as a table.

    Attributes:
        path: the file.
        format: ``"onnx"``, ``"qonnx"``, ``"arrays"`` or ``"program"``.
        bytes: size of the file.
        opset: version of ONNX's operators, or None.
        layers: the quantized layers.
        warnings: restrictions of this file, and runtimes that compute it otherwise.
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

    def table(self) -> FittedTable:
        """Layers and products, for a rich console of any width."""
        table = FittedTable(Column("layer", least=40), *map(Column, ("W bits", "stored as", "A bits")))
        for layer in self.layers:
            inputs = "float" if layer.input_bits is None else str(layer.input_bits)
            table.add_row(layer.name or "(the model)", str(layer.weight_bits), layer.container, inputs)
        for product in self.products:
            table.add_row(product.name, "-", "-", f"{product.x_bits} x {product.y_bits}")
        return table

    def __rich__(self) -> RenderableType:
        """File, layers and warnings, for a rich console of any width."""
        opset = "" if self.opset is None else f", opset {self.opset}"
        heading = f"{self.path}: {self.format}{opset}, {self.bytes:,} bytes"
        return Group(
            Text(heading, no_wrap=True, overflow="ignore"),
            self.table(),
            *(Prose(f"warning: {warning}") for warning in self.warnings),
        )

    def __str__(self) -> str:
        """File, layers and warnings as plain text, 80 columns at most."""
        return plain_text(self)
