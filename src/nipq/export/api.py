"""``nipq.export``: one deployed model, the files that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from torch import nn

from nipq.errors import ConfigError
from nipq.export.arrays import arrays_bytes
from nipq.export.modules import deployed_layers
from nipq.export.onnx_write import FIXED_BATCH, onnx_bytes, qonnx_bytes
from nipq.export.portable import portable_products
from nipq.export.program import program_bytes
from nipq.export.report import ExportedLayer, ExportedProduct, ExportReport
from nipq.files import check_free, written_whole
from nipq.prepare.batches import ExampleInputs

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

    The integers and the input steps in the file are those that were trained; see docs/export.md for what each format
    holds and what equality to expect of whoever runs it.

    Args:
        deployed: what ``nipq.convert`` or ``nipq.load`` returned; it is not changed.
        path: the file.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping by name. Values
            do not matter; the first dimension is the batch and stays open.
        format: ``"onnx"`` (QuantizeLinear, Clip, DequantizeLinear), ``"qonnx"`` (Quant nodes), ``"arrays"`` (NPZ) or
            ``"program"`` (``torch.export``); by the end of the path if not given: ``.onnx``, ``.qonnx.onnx``,
            ``.npz``, ``.pt2``.
        pack: ONNX only: store weights of up to 4 bits as INT4, and of 2 bits as INT2.
        overwrite: replace an existing file.

    Returns:
        What was written; prints itself.

    Raises:
        NotQuantizableError: if a layer has no form in the format.
        ConfigError: if the name is taken or says no format, the model is not deployed, or it cannot be traced.
        NonFiniteError: if a scale leaves the range of float32.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    path = Path(path)
    chosen = format_of(path) if format is None else format
    if chosen not in get_args(Format):
        raise ConfigError(f"export: expected one of the formats {', '.join(get_args(Format))}, found {chosen!r}.")
    if pack and chosen != "onnx":
        raise ConfigError(
            f"export: expected pack=True with the format 'onnx' only, found {chosen!r}. "
            "Leave it out; nipq.save writes the smallest file."
        )
    if not deployed_layers(deployed):
        raise ConfigError(
            f"export: expected a deployed model, found a {type(deployed).__name__} without a deployed layer. "
            "Call nipq.convert(model) first."
        )
    check_free(path, overwrite=overwrite, command="export")
    opset: int | None = None
    warnings: tuple[str, ...] = ()
    layers = _layers(deployed)
    if chosen == "onnx":
        data, opset, layers, warnings = onnx_bytes(deployed, example_inputs, pack=pack)
    elif chosen == "qonnx":
        data, opset, layers, warnings = qonnx_bytes(deployed, example_inputs)
    elif chosen == "arrays":
        data, warnings = arrays_bytes(deployed, example_inputs)
    else:
        data, any_batch = program_bytes(deployed, example_inputs)
        warnings = () if any_batch else (FIXED_BATCH,)
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
    products = tuple(
        ExportedProduct(name, operands["x"].bits, operands["y"].bits)
        for name, operands in portable_products(deployed).items()
    )
    return ExportReport(path, chosen, len(data), opset, layers, warnings, products)


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


def _layers(deployed: nn.Module) -> tuple[ExportedLayer, ...]:
    """Layers in a file that holds the codes in the types of the deployed model."""
    return tuple(
        ExportedLayer(name, layer.weight_bits, str(layer.weight_codes.dtype).removeprefix("torch."), _input_bits(layer))
        for name, layer in deployed_layers(deployed).items()
    )


def _input_bits(layer: nn.Module) -> int | None:
    return getattr(layer, "input_bits", None)
