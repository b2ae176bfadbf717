"""What the ONNX forms of a computed tensor share (a layer's input, an operand), and a product of two operands.

What the ONNX forms of a deployed layer share: its numbers as buffers, and its own forward between quantizers.

Layers and products that write themselves as QuantizeLinear, integer Clip, DequantizeLinear.

Containers have 8 bits up to 8 bits and 16 above; Clip cuts them to the trained range. It stands after the
QuantizeLinear, on integers, where runtimes still see an integer layer. ONNX Runtime has no Clip for 16-bit integers, so
there the float is clipped to the same levels before; the codes are the same.

Layers and products that write themselves as QONNX ``Quant`` nodes, whose bit-width is data and needs no container.

``Quant(x, scale, zero, bits) = (round(clip(x / scale + zero)) - zero) * scale``. Weights are stored as float32 values
on their levels, as the format wants it. On a shifted grid a tie may be rounded to the other side than in the deployed
model, because the zero point is added before; all other grids agree.

ONNX files: the portable one (QuantizeLinear, Clip, DequantizeLinear) and QONNX's (Quant).

Both go through torch's exporter and say in their metadata, under the key ``nipq``, which tensors of the graph belong to
which layer or product. The metadata are a help to find things; a proof compares the tensors themselves.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nipq.errors import NotQuantizableError, require
from nipq.export.modules import Deployed, DeployedLayer, deployed_layers, full_name, take_input
from nipq.export.onnx_graph import Binding, Forms, LayerForm, mark, onnx_graph, operator
from nipq.export.portable import (
    PortableInput,
    PortableLayer,
    PortableProduct,
    input_facts,
    plain_kind,
    portable_input,
    portable_products,
)
from nipq.export.report import ExportedLayer
from nipq.nn.attention import refuse_dropout
from nipq.nn.kinds import along_channels, channel_dim, is_plain, is_table, weight_channel_axis
from nipq.prepare.batches import ExampleInputs


class OnnxInput(LayerForm):
    """A computed tensor on its levels: a layer's input, or an operand of a product. It can be traced, not run.

    Args:
        name: full name of the layer or product.
        given: what becomes of the tensor; None when it stays float.
        part: which operand of a product it is; nothing of a layer.
    """

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, name: str, given: PortableInput | None, part: str = "") -> None:
        super().__init__()
        self.name, self.input, self.part = name, given, part

    @abstractmethod
    def register_input(self, given: PortableInput) -> None:
        """Keep as buffers what the format stores; after a layer's other ones, as the first of equal tensors names them.

        Args:
            given: what becomes of the tensor.
        """

    @abstractmethod
    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """The tensor on its levels, as operators of the format, its codes marked."""

    def trained(self) -> set[str]:
        """The step; a zero point only where the grid may be shifted."""
        if self.input is None:
            return set()
        return {"input_scale", "input_zero_point"} if self.input.grid == "shifted" else {"input_scale"}

    def on_levels(self, x: Tensor) -> Tensor:
        """The tensor on its levels, marked; as it is where it stays float."""
        return x if self.input is None else self.marked(self.quantized_input(x, self.input), "input")

    def marked(self, x: Tensor, role: str) -> Tensor:
        """A tensor named after what it is to the layer or to the operand."""
        return mark(x, self.name, full_name(self.part, role))


class OnnxProduct(LayerForm):
    """A product inside attention, about to be exported: both operands on their levels, multiplied as floats.

    Args:
        name: its full name.
        numbers: its operands.
        operand: what stands for each of them, made of the name, its numbers and which one it is.
    """

    def __init__(
        self, name: str, numbers: PortableProduct, operand: Callable[[str, PortableInput, str], OnnxInput]
    ) -> None:
        super().__init__()
        self.name = name
        self.x, self.y = (operand(name, numbers[part], part) for part in ("x", "y"))
        for part, form in (("x", self.x), ("y", self.y)):
            form.register_input(numbers[part])

    def trained(self) -> set[str]:
        """Those of both operands."""
        return {full_name(part, key) for part, form in (("x", self.x), ("y", self.y)) for key in form.trained()}

    def forward(self, x: Tensor, y: Tensor, drop: float = 0.0) -> Tensor:
        """The product as operators.

        Args:
            x: shape (..., n, k).
            y: shape (..., k, m).
            drop: must be 0.
        """
        refuse_dropout(self.name, drop)
        return mark(torch.matmul(self.x.on_levels(x), self.y.on_levels(y)), self.name, "output")


class OnnxLayer(OnnxInput):
    """One deployed layer, about to be exported; it can be traced, not run.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(name, numbers.input)
        if is_table(layer.layer) and not is_plain(layer.layer):
            raise NotQuantizableError(
                f"{name}: expected an embedding that looks its table up and no more, found {layer.kind} with a forward "
                f"of its own, which ONNX files do not hold. Use Rule({name!r}, quantize=False) when preparing."
            )
        self.shell = layer.layer
        self._buffers["weight"] = numbers.weight  # past register_buffer, as the attribute is a float view
        self.register_buffer("weight_scale", numbers.weight_scale)
        self.register_buffer("bias", numbers.bias)
        #: Whether the weight's scale can only be applied behind the sums.
        self.scale_after = False
        # A subclass may do anything with its bias; the deployed layer adds it after the subclass's forward.
        self.bias_inside = plain_kind(self.shell) is not None or numbers.input is None

    @property
    def integers(self) -> Tensor:
        """What the file holds under the name ``weight``."""
        integers = self._buffers["weight"]
        assert integers is not None
        return integers

    @property
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at its type; see ``nipq.export.modules``."""
        return self.integers.to(torch.float32) * along_channels(self.weight_scale, self.shell, self.integers)

    def trained(self) -> set[str]:
        """The numbers of the layer, and those of its input."""
        return {"weight", "weight_scale", "bias"} | super().trained()

    @abstractmethod
    def dequantized_weight(self) -> Tensor:
        """The weight on its levels, as operators of the format."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer as operators.

        Args:
            *args: the input and what else the trained layer takes.
            **kwargs: the same by name.
        """
        args, kwargs, x = take_input(args, kwargs)
        x = self.on_levels(x)
        parts = {"weight": self.marked(self.dequantized_weight(), "weight")}
        bias = None if self.bias is None else self.marked(self.bias, "bias")
        inside = self.bias_inside and not self.scale_after
        if inside and bias is not None:
            parts["bias"] = bias
        y: Tensor = torch.func.functional_call(self.shell, parts, (x, *args), kwargs)
        if self.scale_after:
            y = y * self._along_channels(self.marked(self.weight_scale, "weight_scale"))
        if not inside and bias is not None:
            y = y + self._along_channels(bias)
        return self.marked(y, "output")

    def _along_channels(self, values: Tensor) -> Tensor:
        """Shaped to broadcast with the output; no reshape, whose target tools take for a batch and change."""
        for _ in range(-channel_dim(self.shell) - 1):
            values = values.unsqueeze(-1)
        return values


class QcdqInput(OnnxInput):
    """The portable form of a layer's input, or of an operand."""

    low: Tensor
    high: Tensor

    def register_input(self, given: PortableInput) -> None:
        """Scale and zero point; limits where the container is wider than the range.

        Args:
            given: what becomes of the tensor.
        """
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("input_zero_point", torch.tensor(given.zero_point, dtype=given.dtype))
        if given.fills_container:
            return
        if given.bits > 8:
            low, high = ((code - given.zero_point) * given.scale for code in (given.low, given.high))
        else:
            low, high = (torch.tensor(code, dtype=given.dtype) for code in (given.low, given.high))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def trained(self) -> set[str]:
        """As in general; limits above 8 bits are floats, which follow the scale."""
        names = super().trained()
        return names | {"low", "high"} if self.input is not None and self.input.bits > 8 else names

    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """QuantizeLinear, Clip where the container is wider than the range, DequantizeLinear."""
        parameters = (self.input_scale, self.input_zero_point)
        clip = not given.fills_container
        if clip and given.bits > 8:
            x = operator("Clip", (x, self.low, self.high), x.dtype, x.shape)
        codes = operator("QuantizeLinear", (x, *parameters), given.dtype, x.shape)
        if clip and given.bits <= 8:
            codes = operator("Clip", (codes, self.low, self.high), given.dtype, x.shape)
        return operator("DequantizeLinear", (self.marked(codes, "codes"), *parameters), torch.float32, x.shape)


class QcdqLayer(OnnxLayer, QcdqInput):
    """The portable form of one deployed layer.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    one: Tensor

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(layer, numbers, name)
        # A grouped transposed convolution has its channels on two axes of the weight; DequantizeLinear scales one.
        grouped = weight_channel_axis(self.shell) == 1 and getattr(self.shell, "groups", 1) > 1
        self.scale_after = grouped and numbers.weight_scale.ndim > 0
        if self.scale_after:
            self.register_buffer("one", torch.ones(()))
        if numbers.input is not None:
            self.register_input(numbers.input)

    def dequantized_weight(self) -> Tensor:
        """DequantizeLinear of the integers."""
        scale = self.one if self.scale_after else self.weight_scale
        axis = {"axis": weight_channel_axis(self.shell)} if scale.ndim else None
        return operator("DequantizeLinear", (self.integers, scale), torch.float32, self.integers.shape, axis)


#: What stands for layers and products.
QCDQ = Forms(QcdqLayer, partial(OnnxProduct, operand=QcdqInput))


class QonnxInput(OnnxInput):
    """The QONNX form of a layer's input, or of an operand."""

    input_bits: Tensor

    def register_input(self, given: PortableInput) -> None:
        """Scale, zero point and bit-width, all as floats.

        Args:
            given: what becomes of the tensor.
        """
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("input_zero_point", torch.tensor(float(given.zero_point)))
        self.register_buffer("input_bits", torch.tensor(float(given.bits)))

    def quantized_input(self, x: Tensor, given: PortableInput) -> Tensor:
        """One Quant."""
        signed = given.grid == "signed"
        x = _quant(x, self.input_scale, self.input_zero_point, self.input_bits, signed=signed)
        return self.marked(x, "codes")


class QonnxLayer(OnnxLayer, QonnxInput):
    """The QONNX form of one deployed layer.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    weight_bits: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(layer, numbers, name)
        self.weight_scale = along_channels(numbers.weight_scale, self.shell, numbers.weight)
        self._buffers["weight"] = numbers.weight.float() * self.weight_scale
        self.register_buffer("weight_bits", torch.tensor(float(numbers.weight_bits)))
        self.register_buffer("weight_zero_point", torch.zeros(()))
        if numbers.input is not None:
            self.register_input(numbers.input)

    @property
    def weight(self) -> Tensor:
        """The weight as floats: the file holds levels."""
        return self.integers

    def dequantized_weight(self) -> Tensor:
        """One Quant."""
        return _quant(self.integers, self.weight_scale, self.weight_zero_point, self.weight_bits, signed=True)


def _quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, *, signed: bool) -> Tensor:
    attributes: dict[str, int | str] = {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"}
    kind = "qonnx.custom_op.general::Quant"
    return operator(kind, (x, scale, zero_point, bits), torch.float32, x.shape, attributes)


#: What stands for layers and products.
QONNX = Forms(QonnxLayer, partial(OnnxProduct, operand=QonnxInput))


#: The metadata's one key, and the version of what it holds.
KEY, VERSION = "nipq", 1
#: Lowest versions of ONNX's operators that know 4-bit and 16-bit codes, and 2-bit codes; and the one of QONNX files.
OPSET, OPSET_INT2, OPSET_QONNX = 21, 25, 18
#: Version of the file itself, by that of the operators.
IR_VERSIONS = {OPSET_QONNX: 8, OPSET: 10, OPSET_INT2: 13}

FIXED_BATCH = "the model fixes the size of its batch itself: the file takes batches of the example's size only"
PACKED = (
    "packed INT4 weights: ONNX Runtime's faithful session computes the same at the same speed; OpenVINO runs these "
    "layers in floats instead of integers"
)
PACKED_INT2 = (
    f"packed INT2 weights need opset {OPSET_INT2}: OpenVINO cannot read them, and ONNX Runtime's default session may "
    "refuse the file; open it with nipq.export.runtimes.faithful_session"
)
WIDE = "inputs above 8 bits: ONNX Runtime computes these layers in floats, OpenVINO drops their quantizers"


def onnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs, *, pack: bool
) -> tuple[bytes, int, tuple[ExportedLayer, ...], tuple[str, ...]]:
    """The portable ONNX file.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with.
        pack: store weights of up to 4 bits as INT4, and of 2 bits as INT2.

    Returns:
        The file, its opset, its layers, and what a reader should know.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    layers = deployed_layers(deployed)
    containers = {name: _container(layer, pack=pack) for name, layer in layers.items()}
    opset = OPSET_INT2 if "int2" in containers.values() else OPSET
    model, bindings = onnx_graph(deployed, example_inputs, QCDQ, opset)
    for binding in bindings:
        if binding["name"] in layers:
            _pack(binding["weight"].producer().inputs[0], containers[binding["name"]])
    warnings = [text for kind, text in (("int4", PACKED), ("int2", PACKED_INT2)) if kind in containers.values()]
    products = portable_products(deployed)
    bits = [layer.input_bits for layer in layers.values() if isinstance(layer, DeployedLayer)]
    if max([*bits, *(given.bits for operands in products.values() for given in operands.values())], default=0) > 8:
        warnings.append(WIDE)
    exported = _written(model, bindings, layers, products, "qcdq", opset, containers)
    return *exported, tuple(warnings + _batch_warning(model))


def qonnx_bytes(
    deployed: nn.Module, example_inputs: ExampleInputs
) -> tuple[bytes, int, tuple[ExportedLayer, ...], tuple[str, ...]]:
    """The QONNX file, whose ``Quant`` nodes hold bit-widths as data.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with.

    Returns:
        As :func:`onnx_bytes`.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    layers = deployed_layers(deployed)
    model, bindings = onnx_graph(deployed, example_inputs, QONNX, OPSET_QONNX)
    containers, products = dict.fromkeys(layers, "float32"), portable_products(deployed)
    exported = _written(model, bindings, layers, products, "qonnx", OPSET_QONNX, containers)
    return *exported, tuple(_batch_warning(model))


def _written(
    model: Any,  # noqa: ANN401  (the package that knows its type is optional)
    bindings: list[Binding],
    layers: dict[str, Deployed],
    products: dict[str, PortableProduct],
    form: str,
    opset: int,
    containers: dict[str, str],
) -> tuple[bytes, int, tuple[ExportedLayer, ...]]:
    about: dict[str, Any] = {"format": form, "version": VERSION}
    about["layers"] = [_record(call, layers[call["name"]]) for call in bindings if call["name"] in layers]
    if products:
        calls = [call for call in bindings if call["name"] in products]
        about["products"] = [_product_record(call, products[call["name"]]) for call in calls]
    model.metadata_props[KEY] = _text(about).ljust(len(_text(_longest(about))))
    model.ir_version, model.producer_name, model.producer_version = IR_VERSIONS[opset], "nipq", producer()
    ir = require("onnx_ir", extra="onnx", purpose="ONNX files")
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    exported = tuple(
        ExportedLayer(name, layer.weight_bits, containers[name], getattr(layer, "input_bits", None))
        for name, layer in layers.items()
    )
    return data, opset, exported


def producer() -> str:
    """The packages on which the bytes of a file depend beside its model."""
    exporter = require("onnxscript", extra="onnx", purpose="ONNX files")
    return f"torch {torch.__version__}, onnxscript {exporter.__version__}"


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, separators=(",", ":"))


def _longest(value: Any) -> Any:  # noqa: ANN401  (any JSON)
    """Metadata with the most digits that zero points may have: a file's size is not to depend on where they fall."""
    if isinstance(value, list):
        return [_longest(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.get("grid") != "shifted":
        return {key: _longest(inner) for key, inner in value.items()}
    levels = 2 ** value["input_bits"] - 1
    return value | {"zero_point": levels, "code_low": -levels, "code_high": levels}


def _record(binding: Binding, layer: Deployed) -> dict[str, Any]:
    """What the metadata say of one call of a layer."""
    weight, bias = binding["weight"].producer().inputs, binding.get("bias")
    return {
        "name": binding["name"],
        "kind": layer.kind,
        "weight": weight[0].name,
        "weight_scale": binding.get("weight_scale", weight[1]).name,
        "bias": None if bias is None else bias.name,
        **_input_names(binding.get("codes")),
        "output": binding["output"].name,
        "weight_bits": layer.weight_bits,
        **input_facts(portable_input(layer) if isinstance(layer, DeployedLayer) else None),
    }


def _product_record(binding: Binding, operands: PortableProduct) -> dict[str, Any]:
    """What the metadata say of one call of a product."""
    parts = {part: _input_names(binding[f"{part}.codes"]) | input_facts(given) for part, given in operands.items()}
    return {"name": binding["name"], **parts, "output": binding["output"].name}


def _input_names(codes: Any) -> dict[str, str | None]:  # noqa: ANN401  (as above)
    """Names of scale, zero point and codes: of the node that reads the codes, or of the Quant that is both in one."""
    if codes is None:
        return dict.fromkeys(("input_scale", "input_zero_point", "codes"))
    nodes = [codes.producer(), *(node for node, _ in codes.uses())]
    node = next(node for node in nodes if node.op_type in ("Quant", "DequantizeLinear"))
    return {"input_scale": node.inputs[1].name, "input_zero_point": node.inputs[2].name, "codes": codes.name}


def _container(layer: Deployed, *, pack: bool) -> str:
    if pack and layer.weight_bits <= 4:
        return "int2" if layer.weight_bits == 2 else "int4"
    return "int8" if layer.weight_codes.dtype == torch.int8 else "int16"


def _pack(weight: Any, container: str) -> None:  # noqa: ANN401  (as above)
    """Give an initialiser a type that torch cannot hold."""
    if container not in ("int2", "int4"):
        return
    ir = require("onnx_ir", extra="onnx", purpose="ONNX files")
    narrow = np.dtype(getattr(require("ml_dtypes", extra="onnx", purpose="packed ONNX files"), container))
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(narrow), name=weight.name)


def _batch_warning(model: Any) -> list[str]:  # noqa: ANN401  (as above)
    is_open = any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape)
    return [] if is_open else [FIXED_BATCH]
