"""Plain arrays: one NPZ file with integers, scales and facts, for people with hardware of their own.

:mod:`nipq.export.arrays_reference` reads the file and computes its layers with NumPy alone.
"""

from __future__ import annotations

import copy
import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.export.portable import input_facts, plain_kind, portable_input
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedProduct,
    deploy_state,
    deployed_layers,
    deployed_products,
    full_name,
)
from nipq.nn.kinds import kind_of, weight_channel_axis
from nipq.prepare.batches import ExampleInputs, call_model, to_device

#: Name and version of the format.
FORMAT, VERSION = "nipq-arrays", 1
#: Name of the text file inside the archive that holds everything which is not an array.
FACTS = "nipq.json"
#: The ``kind`` of a product inside attention.
PRODUCT = "product"

#: A layer or product, and the shapes of one sample of its inputs and of its output.
_Call = tuple[Deployed | DeployedProduct, list[tuple[int, ...]], tuple[int, ...]]

#: Warning about a layer.
CUSTOM = "{}: its class has a forward of its own, which the NumPy reference does not compute"


def arrays_bytes(deployed: nn.Module, example_inputs: ExampleInputs) -> tuple[bytes, tuple[str, ...]]:
    """The NPZ file of a deployed model.

    It holds layers, products inside attention and what stays float, but not how they are connected; the ONNX file has
    that.

    Args:
        deployed: a deployed model.
        example_inputs: its inputs, for the order of the layers and the shapes of their inputs and outputs.

    Returns:
        The file, and warnings for its readers.

    Raises:
        ConfigError: if a layer's own forward does more than its operation, which arrays cannot hold.
    """
    for name, kept in deployed_layers(deployed).items():
        if isinstance(kept, DeployedKeptLayer):
            raise ConfigError(
                f"{name}: expected a layer that its arrays describe, found {kept.kind} with a forward of its own that "
                "does more than its operation. Export to ONNX or a .pt2 program, or save with nipq.save."
            )
    model = copy.deepcopy(deployed).cpu().eval()
    arrays: dict[str, NDArray[Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, (layer, read, written) in _calls(model, example_inputs).items():
        if isinstance(layer, DeployedProduct):
            facts[name] = _product_facts(name, layer, read, written)
            continue
        owner = name if layer.tied_to is None else layer.tied_to
        parts = {"weight": full_name(owner, "weight")}
        arrays[parts["weight"]] = layer.weight_codes.numpy()
        for part in ("scale", "offset", "input_step"):
            if getattr(layer, part, None) is not None:
                parts[part] = full_name(name, part)
        facts[name] = {**_facts(layer, read[0], written), "arrays": parts}
    for key, value in deploy_state(model).items():
        arrays[key] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    text = json.dumps({"format": FORMAT, "version": VERSION, "layers": facts}, indent=1) + "\n"
    return _npz(arrays, text), tuple(CUSTOM.format(name) for name, fact in facts.items() if fact.get("custom"))


@torch.no_grad()
def _calls(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, _Call]:
    """Layers and products in the order in which they are first called."""
    names = {module: name for name, module in (deployed_layers(model) | deployed_products(model)).items()}
    found: dict[str, _Call] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        assert isinstance(layer, (Deployed, DeployedProduct))
        read = [tuple(value.shape[1:]) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found.setdefault(names[layer], (layer, read, tuple(output.shape[1:])))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in names]
    call_model(model, to_device(example_inputs, torch.device("cpu")))
    for handle in handles:
        handle.remove()
    return found


def _facts(layer: Deployed, read: tuple[int, ...], written: tuple[int, ...]) -> dict[str, Any]:
    """Everything about a layer that is not an array."""
    kind, plain = kind_of(layer.layer), plain_kind(layer.layer)
    assert kind is not None
    facts: dict[str, Any] = {
        "kind": kind.__name__,
        "custom": plain is None,
        "input_shape": read,
        "output_shape": written,
        "weight_bits": layer.weight_bits,
    }
    if layer.weight_grid != "signed":
        facts["weight_grid"] = layer.weight_grid
    facts |= input_facts(portable_input(layer))
    if isinstance(layer, DeployedLayer):
        facts["sum_bits"] = _sum_bits(layer)
    has_kernel = hasattr(layer.layer, "kernel_size")
    return facts | _geometry(layer.layer, layer.weight_codes, read, written) if has_kernel else facts


def _product_facts(
    name: str, product: DeployedProduct, read: list[tuple[int, ...]], written: tuple[int, ...]
) -> dict[str, Any]:
    """The same of a product: for each operand the facts of a layer's input, under its name."""
    operands = product.operands()
    parts = {
        part: {"input_shape": shape, **input_facts(portable_input(operand))}
        for (part, operand), shape in zip(operands.items(), read, strict=True)
    }
    largest = read[0][-1] * math.prod(max(-operand.code_low, operand.code_high) for operand in operands.values())
    steps = {f"{part}_step": full_name(name, f"{part}.step") for part in operands}
    sizes = {"output_shape": written, "sum_bits": largest.bit_length() + 1}
    return {"kind": PRODUCT, **parts, **sizes, "arrays": steps}


def _geometry(shell: Any, weight: Tensor, read: tuple[int, ...], written: tuple[int, ...]) -> dict[str, Any]:  # noqa: ANN401
    """Stride, padding and groups; the padding of a transposed convolution is that of the equal plain one."""
    padding: list[list[int]] = []
    reversed_padding: list[int] = shell._reversed_padding_repeated_twice
    for axis, (kernel, dilation, stride) in enumerate(zip(weight.shape[2:], shell.dilation, shell.stride, strict=True)):
        place = 2 * (weight.ndim - 3 - axis)
        before, after = reversed_padding[place], reversed_padding[place + 1]
        if weight_channel_axis(shell) == 1:
            reach, spread = dilation * (kernel - 1), stride * (read[1 + axis] - 1) + 1
            before = reach - before
            after = written[1 + axis] + reach - spread - before  # an output size may have been asked for
        padding.append([before, after])
    return {
        "groups": shell.groups,
        "stride": shell.stride,
        "dilation": shell.dilation,
        "padding": padding,
        "padding_mode": shell.padding_mode,
    }


def _sum_bits(layer: DeployedLayer) -> int:
    """Bits of a two's-complement accumulator that holds every sum that any input can lead to."""
    weight = layer.weight_codes.long().abs()
    groups: int = getattr(layer.layer, "groups", 1)
    if weight_channel_axis(layer.layer) == 1:
        weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).transpose(1, 2).flatten(0, 1)
    largest = int(weight.flatten(1).sum(1).max()) * max(-layer.code_low, layer.code_high)
    return largest.bit_length() + 1


def _npz(arrays: Mapping[str, NDArray[Any]], facts: str) -> bytes:
    """An archive for ``numpy.load``, without pickles, with a text beside the arrays; equal models make equal files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(FACTS), facts)
        for key, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)
    return file.getvalue()
