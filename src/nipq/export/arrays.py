"""Plain arrays: one NPZ file with integers, scales and facts, for people with hardware of their own.

What a deployed layer or product computes, in NumPy alone: a reference for people with hardware of their own.

This file needs nothing but NumPy and may be copied. ``load`` reads what ``nipq.export(model, "model.npz", ...)`` wrote;
``run`` computes one layer from its float input to its float output, to the bit as the deployed model does::

    codes  = clip(round_half_even(x / input_step), code_low, code_high)      float32 division, then whole numbers
    sums   = convolution or product of codes and weight                      whole numbers only
    output = float32(sums) * scale + offset                                  one multiply, one add, in float32

Codes count from the value 0, so padding pads with code 0; hardware with a zero point stores ``codes + zero_point``.
A product inside attention has two such inputs, ``x`` and ``y``, whose codes are multiplied, and no weight.
"""

from __future__ import annotations

import copy
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.export.modules import (
    Deployed,
    DeployedLayer,
    DeployedProduct,
    deploy_state,
    deployed_layers,
    deployed_products,
    full_name,
)
from nipq.export.portable import input_facts, plain_kind, portable_input
from nipq.export.program import call_arguments
from nipq.nn.kinds import kind_of, weight_channel_axis
from nipq.prepare.batches import ExampleInputs

FORMAT, VERSION = "nipq-arrays", 1
#: Name of the text file inside the archive that holds everything which is not an array.
FACTS = "nipq.json"
#: What it calls the kind of a product inside attention.
PRODUCT = "product"

#: A layer or product, the shapes of one sample of what it reads, and of what it writes.
_Call = tuple[Deployed | DeployedProduct, list[tuple[int, ...]], tuple[int, ...]]

CUSTOM = "{}: its class has a forward of its own, which the NumPy reference does not compute"


def arrays_bytes(deployed: nn.Module, example_inputs: ExampleInputs) -> tuple[bytes, tuple[str, ...]]:
    """The NPZ file; ``nipq.export.arrays`` reads it and computes its layers.

    It holds layers, products inside attention and what stays float, but not how they are connected; the ONNX file has
    that.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with, for the order of the layers and the shapes of what they read and write.

    Returns:
        The file, and what a reader should know.
    """
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
    args, kwargs = call_arguments(example_inputs)
    model(*args, **kwargs)
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
    facts |= input_facts(portable_input(layer) if isinstance(layer, DeployedLayer) else None)
    if isinstance(layer, DeployedLayer):
        facts["sum_bits"] = _sum_bits(layer)
    has_kernel = hasattr(layer.layer, "kernel_size")
    return facts | _geometry(layer.layer, layer.weight_codes, read, written) if has_kernel else facts


def _product_facts(
    name: str, product: DeployedProduct, read: list[tuple[int, ...]], written: tuple[int, ...]
) -> dict[str, Any]:
    """The same of a product: of each operand what a layer's input has, under its name."""
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
    """What ``numpy.load`` reads, without pickles, and a text beside the arrays; equal models make equal files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(FACTS), facts)
        for key, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)
    return file.getvalue()


Array = NDArray[Any]
Layer = dict[str, Any]
PAD_MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def load(path: str | Path) -> dict[str, Layer]:
    """Layers and products by name; each holds its arrays and facts under the names that docs/export.md lists."""
    with np.load(path, allow_pickle=False) as file:
        facts = json.loads(file["nipq.json"])["layers"]
        return {name: fact | {part: file[key] for part, key in fact["arrays"].items()} for name, fact in facts.items()}


def run(layer: Layer, x: Array, y: Array | None = None) -> Array:
    """Float32 output of a layer for a batch of float32 inputs, or of a product for its float32 operands x and y."""
    if layer["kind"] == "product":
        if y is None:
            raise ValueError("this is a product inside attention: give both of its operands")
        return product(layer, x, y)
    if layer["input_bits"] is None:
        raise ValueError("this layer's input is float: multiply its weight by its scale and compute in floats")
    if layer["custom"]:
        raise ValueError("this layer's class has a forward of its own, which is not known here")
    return to_output(layer, sums(layer, codes(layer, x)))


def product(layer: Layer, x: Array, y: Array) -> Array:
    """Product of codes, shapes (..., n, k) and (..., k, m), times the product of both steps in float32."""
    whole = codes(operand(layer, "x"), x) @ codes(operand(layer, "y"), y)
    output: Array = whole.astype(np.float32) * (layer["x_step"] * layer["y_step"])
    return output


def operand(layer: Layer, which: str) -> Layer:
    """The operand ``"x"`` or ``"y"`` of a product, to be quantized by ``codes`` as a layer's input is."""
    found: Layer = layer[which] | {"input_step": layer[f"{which}_step"]}
    return found


def codes(layer: Layer, x: Array) -> Array:
    """Whole codes of a float32 input."""
    whole: Array = np.clip(np.rint(x / layer["input_step"]), layer["code_low"], layer["code_high"])
    return whole.astype(np.int64)


def sums(layer: Layer, q: Array) -> Array:
    """Whole sums of products of codes and weight; int64 here, an accumulator of ``sum_bits`` bits holds them."""
    weight: Array = layer["weight"].astype(np.int64)
    if layer["kind"] in ("Linear", "Conv1D"):  # Conv1D is GPT-2's linear layer, its weight the other way round
        product: Array = q @ (weight.T if layer["kind"] == "Linear" else weight)
        return product
    groups, stride, padding = layer["groups"], layer["stride"], layer["padding"]
    if layer["kind"].startswith("ConvTranspose"):  # a convolution of the input with zeros between its elements
        q, weight = _spread(q, stride), _turned(weight, groups)
        stride = [1] * len(stride)
    q = np.pad(q, [(0, 0), (0, 0), *padding], mode=PAD_MODES[layer["padding_mode"]])
    axes = tuple(range(2, q.ndim))
    extent = tuple(d * (k - 1) + 1 for d, k in zip(layer["dilation"], weight.shape[2:], strict=True))
    steps: list[Any] = [slice(None, None, step) for step in (1, 1, *stride, *layer["dilation"])]
    windows: Array = np.lib.stride_tricks.sliding_window_view(q, extent, axes)[tuple(steps)]
    parts = zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True)
    contracted = [1, *range(2 + len(axes), 2 + 2 * len(axes))], [1, *axes]
    return np.concatenate([np.moveaxis(np.tensordot(a, b, contracted), -1, 1) for a, b in parts], axis=1)


def to_output(layer: Layer, s: Array) -> Array:
    """The one multiply and the one add, along the channels."""
    shape = [-1] + [1] * (0 if layer["kind"] in ("Linear", "Conv1D") else s.ndim - 2)
    output: Array = s.astype(np.float32) * layer["scale"].reshape(shape) + layer["offset"].reshape(shape)
    return output


def _spread(q: Array, stride: list[int]) -> Array:
    wide = np.zeros((*q.shape[:2], *(s * (n - 1) + 1 for s, n in zip(stride, q.shape[2:], strict=True))), q.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = q
    return wide


def _turned(weight: Array, groups: int) -> Array:
    """Inputs and outputs of each group exchanged, kernel reversed."""
    blocks = [np.swapaxes(block, 0, 1) for block in np.split(weight, groups)]
    return np.flip(np.concatenate(blocks), tuple(range(2, weight.ndim)))
