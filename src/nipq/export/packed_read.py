"""Read a packed file into a model of the same architecture.

A file may come from anywhere, so everything in it is checked before it is used: first that it is whole, of this format,
unchanged, and no larger than the model warrants, then every record and tensor. Nothing is read that a file of the given
architecture could not need: a header or a payload that is too long is refused by its length alone.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.errors import ConfigError, FileFormatError
from nipq.export.packed_write import FORMAT, FORMAT_VERSION, KEY, checksum
from nipq.functional.grid import Grid, levels
from nipq.functional.packing import FEWEST_BITS, MOST_BITS, unpack
from nipq.nn.attention import PRODUCTS, AttentionProducts, install
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedOperand,
    DeployedProduct,
    DeployedWeightOnlyLayer,
    become_,
    deploy_state,
    deployed_layers,
    full_name,
)
from nipq.nn.integer import bias_of
from nipq.nn.kinds import close_shortcuts_, is_plain, is_supported, is_table, output_channels
from nipq.nn.layers import float_weight, is_prepared
from nipq.nn.shells import kept_shell, plain_shell
from nipq.prepare.convert import bare_model

#: Bytes of the header: so many at any rate, and so many for each tensor of the model. It needs about 0.5 kB a layer.
HEADER_BASE, HEADER_PER_TENSOR = 2**16, 2**12
#: Bytes of payload for each element of the model's state: a weight of 16 bits, a scale, an offset and a step for each
#: channel come to less, and so does a float64.
PAYLOAD_PER_ELEMENT = 16


@dataclass(frozen=True)
class Container:
    """Contents of a packed file, whole and unchanged; records are not validated yet.

    Attributes:
        layers: the metadata's records of layers, in whatever form.
        products: likewise, of products inside attention; None where there are none.
        tensors: by name.
    """

    layers: Any
    products: Any
    tensors: dict[str, Tensor]


def read_container(path: Path, model: nn.Module) -> Container:
    """Read a packed file and check its form: size, format, version and checksum.

    Args:
        path: the file.
        model: the architecture, which limits the length of header and payload.

    Returns:
        Its contents.

    Raises:
        FileFormatError: if it is missing, no whole safetensors file, longer than one of this model can be, of another
            format or version, or changed since it was written.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a packed model file, found none. Check the path.")
    state = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    longest_header = HEADER_BASE + HEADER_PER_TENSOR * len(state)
    longest = 8 + longest_header + PAYLOAD_PER_ELEMENT * sum(value.numel() for value in state)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > longest_header:
                raise FileFormatError(
                    f"{path}: expected a whole safetensors file with a header of at most {longest_header:,} bytes for "
                    f"this {type(model).__name__}, found {length:,}. Save or copy the model again."
                )
            header = file.read(length)
            about = _metadata(path, json.loads(header))  # of a foreign file nothing but the header is read
            data = start + header + file.read(longest - 8 - len(header) + 1)
        if len(data) > longest:
            raise FileFormatError(
                f"{path}: expected at most {longest:,} bytes for this {type(model).__name__}, found more. "
                "Give the architecture that was saved."
            )
        tensors = tensors_of(data)
    except FileFormatError:
        raise
    except (SafetensorError, struct.error, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected a whole safetensors file, found: {error}. Save or copy the model again."
        ) from error
    _check_sum(path, data, len(header), about.get("sha256"))
    return Container(about.get("layers"), about.get("products"), tensors)


def _metadata(path: Path, header: object) -> dict[str, Any]:
    """The metadata of the file, if it is of a version that can be read."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    try:
        about = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: metadata: expected JSON, found {error}. Save or copy the model again."
        ) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: expected a file of format {FORMAT!r}, found another one. Only what nipq.save wrote can be loaded."
        )
    if about.get("version") != FORMAT_VERSION:
        raise FileFormatError(
            f"{path}: expected format version {FORMAT_VERSION}, found {about.get('version')!r}. "
            f"Use the release of nipq that wrote it ({about.get('nipq')})."
        )
    return about


def _check_sum(path: Path, data: bytes, header: int, stated: object) -> None:
    """Refuse a file that was changed since it was written."""
    place = -1
    if isinstance(stated, str) and re.fullmatch("[0-9a-f]{64}", stated):
        place = data.find(stated.encode(), 8, 8 + header)
    if place < 0 or checksum(data, place) != stated:
        raise FileFormatError(
            f"{path}: expected a file with the checksum that it states, found another one: it was changed or damaged "
            "since it was written. Save or copy the model again."
        )


#: A bit-width of a file.
Bits = Annotated[int, Field(ge=FEWEST_BITS, le=MOST_BITS)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputRecord(_Record):
    """Record of a layer's input."""

    bits: Bits
    grid: Literal["signed", "unsigned", "shifted"]
    zero_point: Annotated[int, Field(ge=0)]


#: Any validated records.
Records = TypeVar("Records")


class LayerRecord(_Record):
    """Record of a layer."""

    kind: str
    bits: Bits
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=5)]
    grid: Literal["signed", "balanced", "full"] = "signed"
    tied_to: str | None = None
    input: InputRecord | None = None
    batchnorm: str | None = None
    bias: bool = False
    kept: bool = False
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"

    @property
    def weight_form(self) -> tuple[int, str, list[int]]:
        """Bit-width, grid and shape of the weight, equal for layers that share one."""
        return self.bits, self.grid, self.shape


class ProductRecord(_Record):
    """Record of a product inside attention."""

    x: InputRecord
    y: InputRecord


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a deployed model from a packed file.

    Args:
        path: a file that ``nipq.save`` wrote.
        model: a plain float instance of the same architecture, with any weights; it is not changed. Wrappers
            around it (``torch.compile``, ``DataParallel`` and the like) are left out.

    Returns:
        A deployed copy of the model, on the model's device, equal to the one that was saved in every bit.

    Raises:
        FileFormatError: if the file is missing, truncated, foreign, newer than this version, changed since it was
            written, or of another architecture (with the module's full name).
        ConfigError: if the model is prepared or deployed rather than plain, or something replaced the forward of a
            module whose attention is quantized.
        NotQuantizableError: if a part of the model is wrapped or sharded.
    """
    model = bare_model(model, "load")
    if any(is_prepared(module) or isinstance(module, Deployed) for module in model.modules()):
        raise ConfigError(
            f"load: expected a plain float {type(model).__name__}, found a prepared or deployed one. "
            "Build a new instance of the architecture, or call nipq.restore_ first."
        )
    reader = _Reader(Path(path), model)
    deployed = copy.deepcopy(model)
    forms: dict[nn.Module, Deployed] = {}
    batchnorms: list[nn.Module] = []
    for name, record in reader.records.items():
        layer = reader.find(deployed, name)
        kind, shape = type(layer).__name__, list(getattr(layer, "weight", torch.empty(0)).shape)
        if not is_supported(layer) or (kind, shape) != (record.kind, record.shape):
            raise reader.error(name, f"a {record.kind} with a weight of shape {record.shape}", f"a {kind} with {shape}")
        if is_table(layer) and (record.input is not None or record.batchnorm is not None):
            raise reader.error(name, "a table without input and batch norm", "a record with one of them")
        forms[layer] = reader.layer(layer, name).to(next(layer.parameters()).device)
        if record.batchnorm is not None:
            batchnorms.append(reader.batchnorm(deployed, record.batchnorm))
    for module, form in (*forms.items(), *((batchnorm, nn.Identity()) for batchnorm in dict.fromkeys(batchnorms))):
        become_(module, form)
    close_shortcuts_(deployed)
    for name, products in reader.attentions():
        module = reader.find(deployed, name)
        if "forward" in vars(module):
            raise ConfigError(
                f"{name}: expected a module with the forward of its class, found one that was replaced. "
                "Remove its wrapper, load, and wrap it again."
            )
        install(module, products.to(next(model.parameters()).device))
    deployed.eval().requires_grad_(False)
    reader.fill(deployed)
    return deployed


class _Reader:
    """A packed file in memory.

    Args:
        path: the file.
        model: a plain float instance of the architecture.

    Raises:
        FileFormatError: if it is not a readable file of this format and version.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path = path
        container = read_container(path, model)
        self.tensors = container.tensors
        self.records = self._records(container.layers, model)
        self.products = self._products(container.products, model)
        self.codes: dict[str, Tensor] = {}

    def error(self, name: str, expected: str, found: str) -> FileFormatError:
        """The error for what does not fit, with the module's full name."""
        remedy = "Give the architecture that was saved, or save the model again."
        return FileFormatError(f"{self.path}: {name}: expected {expected}, found {found}. {remedy}")

    def _records(self, layers: object, model: nn.Module) -> dict[str, LayerRecord]:
        names = dict(model.named_modules(remove_duplicate=False))
        for name in layers if isinstance(layers, dict) else ():  # first, so that what follows is no longer than a model
            if name not in names:
                raise self.error(name, "the model to have this module", f"none in {type(model).__name__}")
        return self._checked(TypeAdapter(dict[str, LayerRecord]), layers)

    def _products(self, products: object, model: nn.Module) -> dict[str, ProductRecord]:
        modules = dict(model.named_modules(remove_duplicate=False))
        given = products if isinstance(products, dict) else {}
        for name in given:  # first, for the same reason
            where, part = _attention_of(name)
            partner = f"{name.removesuffix(part)}{'mix' if part == 'scores' else 'scores'}"
            if part not in ("scores", "mix") or partner not in given:
                raise self.error(name, f"both products of an attention under {PRODUCTS!r}", "another name or one alone")
            if where not in modules:
                raise self.error(name, "the model to have the module around it", f"none in {type(model).__name__}")
            around = [
                modules[where[:end]] for end in range(len(where) + 1) if end in (0, len(where)) or where[end] == "."
            ]
            if any(map(is_supported, around)):
                raise self.error(name, "attention outside of layers", f"it in a {type(modules[where]).__name__}")
        return self._checked(TypeAdapter(dict[str, ProductRecord]), {} if products is None else products)

    def _checked(self, kind: TypeAdapter[Records], given: object) -> Records:
        """Records as the file has them, or an error that names the first faulty field."""
        try:
            return kind.validate_python(given)
        except ValidationError as error:
            fault = error.errors()[0]
            where, *field = (str(part) for part in fault["loc"] or ("metadata",))
            raise self.error(where, f"{'.'.join(field)}: {fault['msg']}", repr(fault["input"])) from error

    def attentions(self) -> Iterator[tuple[str, AttentionProducts]]:
        """Modules whose attention is quantized, and the products that are installed there."""
        for name in self.products:
            where, part = _attention_of(name)
            if part == "scores":
                pair = self.product(name), self.product(f"{name.removesuffix(part)}mix")
                yield where, AttentionProducts(*pair, name=where)

    def product(self, name: str) -> DeployedProduct:
        """A product inside attention."""
        return DeployedProduct(name, *(self.operand(name, part) for part in ("x", "y")))

    def operand(self, name: str, part: str) -> DeployedOperand:
        """One operand of a product."""
        record: InputRecord = getattr(self.products[name], part)
        step = self.floats(name, f"{part}.step", (1,), positive=True)
        code_range = self.code_range(name, record)
        return DeployedOperand(
            step, bits=record.bits, grid=record.grid, zero_point=record.zero_point, code_range=code_range
        )

    def code_range(self, name: str, record: InputRecord) -> tuple[int, int]:
        """Lowest and highest code that a record stands for, counted from the zero point."""
        n = int(levels(record.bits, Grid(record.grid)))
        if record.zero_point > (n if record.grid == "shifted" else 0):
            expected = f"a zero point of a {record.grid} grid of {record.bits} bits"
            raise self.error(name, expected, str(record.zero_point))
        return (-n if record.grid == "signed" else -record.zero_point), n - record.zero_point

    def find(self, model: nn.Module, name: str) -> nn.Module:
        """The module of that name."""
        try:
            return model.get_submodule(name)
        except AttributeError:
            raise self.error(name, "the model to have this module", f"none in {type(model).__name__}") from None

    def batchnorm(self, model: nn.Module, name: str) -> nn.Module:
        """The batch norm of that name; nothing else may be left out of a model."""
        module = self.find(model, name)
        if not isinstance(module, _BatchNorm):
            raise self.error(name, "a batch norm to fold", f"a {type(module).__name__}")
        return module

    def take(self, name: str, part: str) -> Tensor:
        """A tensor of a layer."""
        key = full_name(name, part)
        if key not in self.tensors:
            raise self.error(name, f"the tensor {key!r} in the file", "none")
        return self.tensors[key]

    def floats(
        self, name: str, part: str, counts: tuple[int, ...], *, positive: bool, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A finite vector of one of the given lengths, of the given type."""
        value = self.take(name, part)
        if value.dtype != dtype or value.ndim != 1 or len(value) not in counts:
            kind = str(dtype).removeprefix("torch.")
            raise self.error(name, f"{part} of {counts[-1]} {kind} numbers", f"{value.dtype} {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()) or (positive and not bool((value > 0).all())):
            raise self.error(name, f"{part} finite{' and above 0' if positive else ''}", f"{value.tolist()[:3]} ...")
        return value

    def weight(self, name: str) -> Tensor:
        """Codes of the layer, or of the one whose codes they are: the same tensor."""
        record = self.records[name]
        if record.tied_to is not None:
            owner = self.records.get(record.tied_to)
            if owner is None or owner.tied_to is not None or owner.weight_form != record.weight_form:
                raise self.error(name, "its weight to be that of another layer in the file", repr(record.tied_to))
            return self.weight(record.tied_to)
        if name not in self.codes:
            planes = self.take(name, "planes")
            try:
                codes = unpack(planes.numpy(), record.bits, record.shape, Grid(record.grid))
                self.codes[name] = torch.from_numpy(codes)
            except (FileFormatError, TypeError) as error:
                raise FileFormatError(f"{self.path}: {name}: {error}") from error
        return self.codes[name]

    def layer(self, layer: nn.Module, name: str) -> Deployed:
        """The deployed form of a plain layer."""
        record, codes, channels = self.records[name], self.weight(name), output_channels(layer)
        dtype = float_weight(layer).dtype
        if str(dtype) != f"torch.{record.dtype}":
            raise self.error(name, f"a layer of {record.dtype}", str(dtype))
        common: dict[str, Any] = {
            "weight_bits": record.bits,
            "weight_grid": record.grid,
            "tied_to": record.tied_to,
            "dtype": dtype,
        }
        inputs: dict[str, Any] = {}
        if record.input is not None:
            inputs = {
                "input_bits": record.input.bits,
                "grid": record.input.grid,
                "zero_point": record.input.zero_point,
                "code_range": self.code_range(name, record.input),
            }
        step = None if record.input is None else self.floats(name, "input_step", (1,), positive=True)
        if record.kept:
            if is_plain(layer) or record.batchnorm is not None:
                raise self.error(name, "a layer with a forward of its own and no batch norm", "another one")
            scale = self.floats(name, "scale", (1, channels), positive=True)
            return DeployedKeptLayer(kept_shell(layer), codes, scale, step, **common, **inputs)
        shell = plain_shell(layer)
        if step is None:
            if record.bias != (bias_of(layer) is not None):
                raise self.error(name, f"a layer {'with' if record.bias else 'without'} bias", "the opposite")
            scale = self.floats(name, "scale", (1, channels), positive=True)
            offset = self.floats(name, "offset", (channels,), positive=False, dtype=dtype) if record.bias else None
            return DeployedWeightOnlyLayer(shell, codes, scale, offset, **common)
        return DeployedLayer(
            shell,
            codes,
            # A batch norm may have made a scale negative, or zero.
            self.floats(name, "scale", (channels,), positive=record.batchnorm is None),
            self.floats(name, "offset", (channels,), positive=False),
            step,
            batchnorm=record.batchnorm,
            has_bias=bias_of(layer) is not None,
            **common,
            **inputs,
        )

    def fill(self, model: nn.Module) -> None:
        """Set what stayed float, and refuse tensors too many, too few or of another shape or type."""
        own = deploy_state(model)
        planes = {full_name(name, "planes") for name in deployed_layers(model)}
        for key in sorted(own.keys() ^ (self.tensors.keys() - planes)):
            where, other = ("file", "model") if key in self.tensors else ("model", "file")
            raise self.error(key, f"the {other} to have this tensor, as the {where} has", "none")
        for key, value in own.items():
            stored = self.tensors[key]
            if (value.shape, value.dtype) != (stored.shape, stored.dtype):
                found = f"{stored.dtype} {tuple(stored.shape)}"
                raise self.error(key, f"{value.dtype} {tuple(value.shape)}", found)
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(self.tensors[key])


def _attention_of(product: str) -> tuple[str, str]:
    """Split a product's name into its module's and ``"scores"`` or ``"mix"``; an empty part if it is no product."""
    *where, container, part = ("", *product.split("."))
    return ".".join(where[1:]), part if container == PRODUCTS else ""
