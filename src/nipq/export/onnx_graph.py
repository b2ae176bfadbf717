"""ONNX graphs of deployed models: layers and products as ONNX operators, traced by torch's own exporter.

While the model is exported, a form stands for each deployed layer and product. There are two kinds of form:

- QCDQ, the portable one: QuantizeLinear, integer Clip, DequantizeLinear. Containers have 8 bits up to 8 bits and 16
  above; Clip cuts them to the trained range. It stands after the QuantizeLinear, on integers, where runtimes still see
  an integer layer. ONNX Runtime has no Clip for 16-bit integers, so there the float is clipped to the same levels
  before; the codes are the same.
- QONNX: ``Quant`` nodes, whose bit-width is data and needs no container. ``Quant(x, scale, zero, bits) =
  (round(clip(x / scale + zero)) - zero) * scale``. Weights are stored as float32 values on their levels, as the format
  wants it. On a shifted grid a tie may be rounded to the other side than in the deployed model, because the zero point
  is added before; all other grids agree.

Forms mark their tensors while they are traced. Marks are operators of a domain of their own; the exporter's optimizer
leaves them alone, and they are taken out again once the names of the tensors around them are read.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError, first_line, require
from nipq.export.portable import (
    PortableInput,
    PortableLayer,
    PortableProduct,
    plain_kind,
    portable_layers,
    portable_products,
)
from nipq.export.program import exported_program
from nipq.nn.deployed import (
    Deployed,
    become_,
    deployed_layers,
    deployed_products,
    full_name,
    take_input,
)
from nipq.nn.integer import refuse_dropout
from nipq.nn.kinds import along_channels, channel_dim, weight_channel_axis
from nipq.prepare.batches import ExampleInputs

#: Domain of the marks.
_MARKS = "nipq"
#: Roles of the tensors of a layer that are computed, and of a product; where two roles are one tensor, the last one
#: names it.
_ROLES = ("weight", "input", "codes", "x.input", "x.codes", "y.input", "y.codes", "output")
#: The tensors of one call of a layer or of a product, by role.
Binding = dict[str, Any]


class LayerForm(nn.Module, ABC):
    """Stand-in for a deployed layer, a product or one of its operands while their model is exported."""

    @abstractmethod
    def trained(self) -> set[str]:
        """Names of the buffers whose values training decides; all others follow from bits and grids."""


class Forms(NamedTuple):
    """The forms of deployed modules in one format.

    Attributes:
        layer: builds it from the layer, its numbers and its name.
        product: builds it from the name and the numbers of a product.
    """

    layer: Callable[[Deployed, PortableLayer, str], LayerForm]
    product: Callable[[str, PortableProduct], LayerForm]


def onnx_graph(
    deployed: nn.Module, example_inputs: ExampleInputs, form: Forms, opset: int
) -> tuple[Any, list[Binding]]:
    """Export a deployed model with its layers in another form.

    Args:
        deployed: a deployed model.
        example_inputs: its inputs; the batch may have any size.
        form: :data:`QCDQ` or :data:`QONNX`.
        opset: version of ONNX's operators.

    Returns:
        An ``onnx_ir.Model``, and the values of each call of a layer or product in the order of the graph.

    Raises:
        ConfigError: if torch cannot export the model.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    require("onnxscript", extra="onnx", purpose="ONNX files")
    numbers, operands, model = portable_layers(deployed), portable_products(deployed), copy.deepcopy(deployed)
    layers, products = deployed_layers(model), deployed_products(model)
    forms = {name: form.layer(layer, numbers[name], name) for name, layer in layers.items()}
    forms |= {name: form.product(name, operands[name]) for name in products}
    for name, module in (layers | products).items():  # in place, as lists and dicts may hold it, too
        become_(module, forms[name])
    program = exported_program(model.cpu().eval(), example_inputs)
    settings: dict[str, Any] = {"opset_version": opset, "verbose": False, "external_data": False, "optimize": False}
    with _quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, **settings)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ConfigError(
                f"{type(deployed).__name__}: expected a model that torch's exporter can write as ONNX, found: "
                f"{first_line(error)}. Export a .pt2 program, or save it with nipq.save."
            ) from error
        assert exported is not None
        with _unseen(exported.model.graph, {full_name(name, key) for name in forms for key in forms[name].trained()}):
            exported.optimize()
    bindings = _without_marks(exported.model)
    _tidy(exported.model, bindings)
    return exported.model, bindings


@contextmanager
def _unseen(graph: Any, names: set[str]) -> Iterator[None]:  # noqa: ANN401  (the package that knows is optional)
    """Hide values from the exporter's optimizer: it merges equal tensors, and file sizes must not depend on those."""
    values = [value for name, value in graph.initializers.items() if name in names]
    tensors = [value.const_value for value in values]
    for value in values:
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    yield
    for value, tensor in zip(values, tensors, strict=True):
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.initializers[value.name] = value


def _without_marks(model: Any) -> list[Binding]:  # noqa: ANN401  (the package that knows its type is optional)
    """Take the marks out of the graph; returns the tensors that they marked, one binding for each call of a layer."""
    calls: list[Binding] = []
    latest: dict[str, Binding] = {}  # marks that two calls of one layer share are merged into one by the exporter
    marks = [node for node in model.graph if node.domain == _MARKS]
    for node in marks:
        name, role = node.attributes["layer"].value, node.attributes["role"].value
        binding = latest.setdefault(name, {"name": name})
        binding[role] = node.inputs[0]
        node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
        if role == "output":
            calls.append(dict(binding))
    model.graph.remove(marks, safe=True)
    del model.graph.opset_imports[_MARKS]
    return calls


def _tidy(model: Any, calls: list[Binding]) -> None:  # noqa: ANN401  (as above)
    """Name tensors after layers, give the batch one name, and remove all that is about the exporting machine."""
    initializers = list(model.graph.initializers.values())
    values = [*model.graph.inputs, *initializers, *(value for node in model.graph for value in node.outputs)]
    for thing in (model, model.graph, *model.graph, *values):
        thing.metadata_props.clear()
        thing.doc_string = None
    sizes = [size for value in model.graph.inputs for size in value.shape if not isinstance(size, int)]
    symbols = "|".join({str(size) for size in sizes if not str(size).isdigit()}) or "$^"
    for value in values:
        if value.shape is not None:  # which may be frozen, so it is replaced
            texts = [re.sub(rf"\b({symbols})\b", "batch", str(size)) for size in value.shape]
            value.shape = type(value.shape)([int(text) if text.isdigit() else text for text in texts])
    for value in initializers:
        value.type = value.shape = None  # the tensor has them
    outputs = model.graph.outputs
    taken = {value.name for value in values}
    for index, value in enumerate(outputs):
        _rename(value, "output" if len(outputs) == 1 else f"output_{index}", taken)
    for call in calls:
        for role in _ROLES:
            if role in call and call[role] not in outputs:
                _rename(call[role], full_name(call["name"], "levels" if role == "weight" else role), taken)
    for node in model.graph:
        node.name = node.outputs[0].name


def _rename(value: Any, name: str, taken: set[str]) -> None:  # noqa: ANN401  (as above)
    """Give a value a name, with a number if another one has it."""
    free = (name if count == 0 else f"{name}_{count}" for count in itertools.count())
    value.name = next(candidate for candidate in free if candidate not in taken)
    taken.add(value.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on its own progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def operator(
    kind: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    attributes: Mapping[str, int | str] | None = None,
) -> Tensor:
    """Emit one ONNX operator while torch exports.

    Args:
        kind: its name, after its domain and ``::`` unless it is ONNX's own.
        inputs: its inputs.
        dtype: type of its output.
        shape: shape of its output.
        attributes: its attributes.

    Returns:
        A stand-in for its output.
    """
    version = 1 if "::" in kind else None
    return torch.onnx.ops.symbolic(kind, inputs, dict(attributes or {}), dtype=dtype, shape=shape, version=version)


def mark(x: Tensor, layer: str, role: str) -> Tensor:
    """Mark a tensor of the graph with the full name of its layer and its role there, such as ``"codes"``."""
    return operator(f"{_MARKS}::Mark", (x,), x.dtype, x.shape, {"layer": layer, "role": role})


class OnnxInput(LayerForm):
    """Form of a computed tensor on its levels, a layer's input or an operand of a product; for tracing only.

    Args:
        name: full name of the layer or product.
        given: its numbers; None when it stays float.
        part: which operand of a product it is; nothing of a layer.
    """

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, name: str, given: PortableInput | None, part: str = "") -> None:
        super().__init__()
        self.name, self.input, self.part = name, given, part

    @abstractmethod
    def register_input(self, given: PortableInput) -> None:
        """Register the buffers that the format stores, after the layer's own: the first of equal tensors names them."""

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
        """A tensor, marked with its role in the layer or the operand."""
        return mark(x, self.name, full_name(self.part, role))


class OnnxProduct(LayerForm):
    """Form of a product inside attention: both operands on their levels, multiplied as floats.

    Args:
        name: its full name.
        numbers: its operands.
        operand: builds the form of each of them from the name, its numbers and ``"x"`` or ``"y"``.
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
    """Form of a deployed layer; for tracing only.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(name, numbers.input)
        self.shell = layer.layer
        self._buffers["weight"] = numbers.weight  # past register_buffer, as the attribute is a float view
        self.register_buffer("weight_scale", numbers.weight_scale)
        self.register_buffer("bias", numbers.bias)
        #: Whether the weight's scale can only be applied behind the sums.
        self.scale_after = False
        # The bias of a layer with a forward of its own is added after that, or is the layer's own affair.
        self.bias_inside = plain_kind(self.shell) is not None or numbers.input is None

    @property
    def integers(self) -> Tensor:
        """The tensor that the file holds under the name ``weight``."""
        integers = self._buffers["weight"]
        assert integers is not None
        return integers

    @property
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at its type; see ``nipq.nn.deployed``."""
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
            *args: the trained layer's arguments, the input first.
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
        """Scale and zero point; limits where the container is wider than the range."""
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


#: Forms of the portable format: QuantizeLinear, Clip, DequantizeLinear.
QCDQ = Forms(QcdqLayer, partial(OnnxProduct, operand=QcdqInput))


class QonnxInput(OnnxInput):
    """The QONNX form of a layer's input, or of an operand."""

    input_bits: Tensor

    def register_input(self, given: PortableInput) -> None:
        """Scale, zero point and bit-width, all as floats."""
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
        self.register_buffer("weight_bits", torch.tensor(float(numbers.code_bits)))
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


#: Forms of QONNX: ``Quant`` nodes.
QONNX = Forms(QonnxLayer, partial(OnnxProduct, operand=QonnxInput))
