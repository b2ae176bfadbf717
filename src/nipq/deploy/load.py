"""Read a packed file into a model of the same architecture; everything in it is checked before anything is built."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nipq.deploy.file import FORMAT, FORMAT_VERSION
from nipq.deploy.modules import (
    Deployed,
    DeployedLayer,
    DeployedWeightOnlyLayer,
    deploy_state,
    deployed_layers,
    full_name,
    replace_modules,
)
from nipq.errors import ConfigError, FileFormatError
from nipq.functional.grid import UNSIGNED, Grid, levels
from nipq.functional.packing import unpack
from nipq.nn.layers import SUPPORTED, is_prepared, plain_shell

Bits = Annotated[int, Field(ge=2, le=16)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputRecord(_Record):
    """What the file says of a layer's input."""

    bits: Bits
    grid: Literal["signed", "unsigned", "shifted"]
    zero_point: Annotated[int, Field(ge=0, le=65535)]


class LayerRecord(_Record):
    """What the file says of a layer."""

    bits: Bits
    shape: list[Annotated[int, Field(ge=0)]]
    planes: str
    input: InputRecord | None = None
    batchnorm: str | None = None
    bias: bool = False


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a deployed model from a packed file.

    Args:
        path: what ``nipq.save`` wrote.
        model: a plain float instance of the same architecture, with any weights; it is not changed.

    Returns:
        A deployed copy of the model, equal to the one that was saved in every bit.

    Raises:
        FileFormatError: if the file is missing, truncated, foreign, newer than this version, damaged, or of another
            architecture (with the module's full name).
        ConfigError: if the model is prepared or deployed rather than plain.
    """
    path = Path(path)
    if any(is_prepared(module) or isinstance(module, Deployed) for module in model.modules()):
        raise ConfigError(
            f"load: expected a plain float {type(model).__name__}, found a prepared or deployed one. "
            "Build a new instance of the architecture, or call nipq.restore_ first."
        )
    records, tensors = read(path)
    twin = copy.deepcopy(model)
    replacements: dict[nn.Module, nn.Module] = {}
    codes: dict[str, Tensor] = {}
    for name, record in records.items():
        layer = _submodule(twin, name, path)
        if not isinstance(layer, SUPPORTED) or list(layer.weight.shape) != record.shape:
            found = f"{type(layer).__name__} {list(getattr(layer, 'weight', torch.empty(0)).shape)}"
            raise FileFormatError(f"{path}: {name}: expected a layer with a weight of shape {record.shape}, found {found}.")
        if record.planes not in codes:
            planes = _take(tensors, full_name(record.planes, "planes"), path)
            codes[record.planes] = _codes(planes, record, name, path)
        replacements[layer] = _layer(layer, codes[record.planes], record, name, tensors, path)
        if record.batchnorm is not None:
            replacements[_submodule(twin, record.batchnorm, path)] = nn.Identity()
    twin = replace_modules(twin, replacements).eval().requires_grad_(False)
    _load_rest(twin, tensors, path)
    return twin


def read(path: Path) -> tuple[dict[str, LayerRecord], dict[str, Tensor]]:
    """Records and tensors of a packed file.

    Args:
        path: the file.

    Returns:
        ``(records by layer, tensors by name)``.

    Raises:
        FileFormatError: if it is not a readable file of this format and version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a packed model file, found none. Check the path.")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: not a readable safetensors file: {error}. Save the model again.") from error
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: expected format {FORMAT!r}, found {metadata.get('format')!r}. Only files that nipq.save wrote can "
            "be loaded."
        )
    if metadata.get("version") != str(FORMAT_VERSION):
        raise FileFormatError(
            f"{path}: expected format version {FORMAT_VERSION}, found {metadata.get('version')!r}. Use the version of "
            f"nipq that wrote it ({metadata.get('nipq')!r})."
        )
    try:
        records = TypeAdapter(dict[str, LayerRecord]).validate_python(json.loads(metadata["layers"]))
    except (KeyError, ValueError, RecursionError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else error
        raise FileFormatError(f"{path}: its layer table is damaged: {detail}. Save the model again.") from error
    return records, tensors


def _submodule(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FileFormatError(
            f"{path}: expected the model to have a module {name!r}, found none. Build the architecture that was saved."
        ) from None


def _take(tensors: dict[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in tensors:
        raise FileFormatError(f"{path}: expected the tensor {key!r}, found none. Save the model again.")
    return tensors[key]


def _codes(planes: Tensor, record: LayerRecord, name: str, path: Path) -> Tensor:
    try:
        codes = unpack(planes.numpy(), record.bits, record.shape)
    except (FileFormatError, TypeError) as error:
        raise FileFormatError(f"{path}: {name}: {error}") from error
    return torch.from_numpy(codes).to(torch.int8 if record.bits <= 8 else torch.int16)


def _layer(
    layer: nn.Module, codes: Tensor, record: LayerRecord, name: str, tensors: dict[str, Tensor], path: Path
) -> Deployed:
    scale, offset = (_floats(tensors, full_name(name, part), path) for part in ("scale", "offset"))
    shell = plain_shell(layer)
    if record.input is None:
        return DeployedWeightOnlyLayer(shell, codes, scale, offset if record.bias else None, weight_bits=record.bits)
    step = _floats(tensors, full_name(name, "input_step"), path)
    if step.numel() != 1 or not float(step) > 0:
        raise FileFormatError(f"{path}: {name}: expected one input step above 0, found {step.tolist()[:3]}.")
    kind, zero_point = record.input.grid, record.input.zero_point
    n = int(levels(float(record.input.bits), Grid("signed") if kind == "signed" else UNSIGNED))
    low = -n if kind == "signed" else -zero_point
    if zero_point > n or (zero_point and kind != "shifted"):
        raise FileFormatError(f"{path}: {name}: a {kind} grid of {record.input.bits} bits has no zero point {zero_point}.")
    return DeployedLayer(
        shell,
        codes,
        scale,
        offset,
        step,
        weight_bits=record.bits,
        input_bits=record.input.bits,
        grid=kind,
        zero_point=zero_point,
        code_range=(low, n - zero_point),
        batchnorm=record.batchnorm,
    )


def _floats(tensors: dict[str, Tensor], key: str, path: Path) -> Tensor:
    value = _take(tensors, key, path)
    if value.dtype != torch.float32 or value.ndim != 1 or not bool(torch.isfinite(value).all()):
        raise FileFormatError(
            f"{path}: {key}: expected finite float32 numbers along one axis, found {value.dtype} of shape "
            f"{tuple(value.shape)}. Save the model again."
        )
    return value


def _load_rest(twin: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill what stayed float, and refuse tensors too many, too few or of another shape."""
    own = deploy_state(twin)
    planes = {full_name(name, "planes") for name in deployed_layers(twin)}
    for key in sorted(set(own) ^ (set(tensors) - planes)):
        where = "the file has" if key in tensors else "the model needs"
        raise FileFormatError(f"{path}: {where} the tensor {key!r} and the other has not. Build the saved architecture.")
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            raise FileFormatError(
                f"{path}: {key}: expected shape {tuple(value.shape)}, found {tuple(tensors[key].shape)}."
            )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[key])
