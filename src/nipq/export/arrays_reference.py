"""NumPy reference of deployed layers and products, for people with hardware of their own.

This file needs nothing but NumPy and may be copied. ``load`` reads what ``nipq.export(model, "model.npz", ...)`` wrote;
``run`` computes one layer from its float input to its float output, to the bit as the deployed model does::

    codes  = clip(round_half_even(x / input_step), code_low, code_high)      float32 division, then whole numbers
    sums   = convolution or product of codes and weight                      whole numbers only
    output = float32(sums) * scale + offset                                  one multiply, one add, in float32

Codes count from the value 0, so padding pads with code 0; hardware with a zero point stores ``codes + zero_point``.
A product inside attention has two such inputs, ``x`` and ``y``, whose codes are multiplied, and no weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Layer = dict[str, Any]
#: Padding modes of NumPy, by torch's.
PAD_MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def load(path: str | Path) -> dict[str, Layer]:
    """Read a file: layers and products by name, each with its arrays and facts by the names in the documentation."""
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
