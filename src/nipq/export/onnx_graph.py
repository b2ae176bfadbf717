"""From a module tree to an ONNX graph through torch's own exporter, and the names of what stands for which layer.

A layer, or a product inside attention, marks its tensors while it is traced. Marks are operators of a domain of their
own; the exporter's optimizer leaves them alone, and they are taken out again once the names of the tensors around them
are read.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nipq.errors import require
from nipq.export.modules import Deployed, deployed_layers, deployed_products, full_name, replace_modules
from nipq.export.portable import PortableLayer, PortableProduct, portable_layers, portable_products
from nipq.export.program import exported_program
from nipq.prepare.batches import ExampleInputs

_MARKS = "nipq"

#: Roles of the tensors of a layer that are computed, and of a product; where two roles are one tensor, the last one
#: names it.
_ROLES = ("weight", "input", "codes", "x.input", "x.codes", "y.input", "y.codes", "output")


class LayerForm(nn.Module, ABC):
    """What stands for a deployed layer, a product or one of its operands while their model is exported."""

    @abstractmethod
    def trained(self) -> set[str]:
        """Names of the buffers whose values training decides; all others follow from bits and grids."""


class Forms(NamedTuple):
    """What deployed modules are replaced by in one format.

    Attributes:
        layer: builds it from the layer, its numbers and its name.
        product: builds it from the name and the numbers of a product.
    """

    layer: Callable[[Deployed, PortableLayer, str], LayerForm]
    product: Callable[[str, PortableProduct], LayerForm]


#: The tensors of one call of a layer or of a product, by role.
Binding = dict[str, Any]


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
    """Name a tensor of the graph after what it is to a layer.

    Args:
        x: the tensor.
        layer: full name of the layer.
        role: what it is, such as ``"codes"``.

    Returns:
        The tensor.
    """
    return operator(f"{_MARKS}::Mark", (x,), x.dtype, x.shape, {"layer": layer, "role": role})


def onnx_graph(
    deployed: nn.Module, example_inputs: ExampleInputs, form: Forms, opset: int
) -> tuple[Any, list[Binding]]:
    """Export a deployed model with its layers in another form.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with; its batch may have any size.
        form: what stands for each layer and product.
        opset: version of ONNX's operators.

    Returns:
        An ``onnx_ir.Model``, and the values of each call of a layer or product in the order of the graph.

    Raises:
        ConfigError: if torch cannot export the model.
        NotQuantizableError: if a layer has no form in ONNX files.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    require("onnxscript", extra="onnx", purpose="ONNX files")
    numbers, operands, twin = portable_layers(deployed), portable_products(deployed), copy.deepcopy(deployed)
    layers, products = deployed_layers(twin), deployed_products(twin)
    forms = {name: form.layer(layer, numbers[name], name) for name, layer in layers.items()}
    forms |= {name: form.product(name, operands[name]) for name in products}
    twin = replace_modules(twin, {module: forms[name] for name, module in (layers | products).items()})
    program = exported_program(twin.cpu().eval(), example_inputs)
    settings: dict[str, Any] = {"opset_version": opset, "verbose": False, "external_data": False, "optimize": False}
    with _quiet():
        exported = torch.onnx.export(program, dynamo=True, **settings)
        assert exported is not None
        with _unseen(exported.model.graph, {full_name(name, key) for name in forms for key in forms[name].trained()}):
            exported.optimize()
    model = exported.model
    bindings = _without_marks(model)
    _tidy(model, bindings)
    return model, bindings


@contextmanager
def _unseen(graph: Any, names: set[str]) -> Iterator[None]:  # noqa: ANN401  (the package that knows is optional)
    """Keep values from the exporter's optimizer, which merges equal tensors: a file's size is not to depend on them."""
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
    """Take the marks out of the graph and say what they stood on, one binding for each call of a layer."""
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
    """Names after the layers, one name for the batch, and nothing about the machine that exported."""
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
    """The exporter's remarks on its own progress are of no use here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
