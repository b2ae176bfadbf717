"""Portable numbers of deployed layers: positive scales, one for the weight and one for the input, as other tools read.

The deployed layer multiplies its whole sums by one ``scale``, which a batch norm may have made negative. Exchange
formats give the input and the weight a scale of their own, both positive, and multiply before they sum::

    codes of the weight = sign(scale) * trained codes        exact, the range is symmetric
    weight scale        = |scale| / input_step               in float64, rounded once to float32
    bias                = offset                             to the bit

A channel whose factor is 0, as its gamma is, gets codes 0 and scale 1: the same result, and no reader divides by 0.
Every number is a function of the deployed layer, so a file can be compared with the model to the bit. The product of
both scales is the trained one up to its last binary digit; nothing is recomputed from clipping ranges.

An operand of a product inside attention is treated as a layer's input is, by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError, NonFiniteError
from nipq.functional.grid import GridKind
from nipq.functional.packing import MOST_BITS
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedOperand,
    DeployedWeightOnlyLayer,
    deployed_layers,
    deployed_products,
)
from nipq.nn.kinds import along_channels, is_plain, kind_of


@dataclass(frozen=True)
class PortableInput:
    """Quantization of a computed tensor: a layer's input, or an operand of a product inside attention.

    Attributes:
        scale: the trained step, float32, no dimensions.
        bits: bit-width.
        grid: kind of grid.
        zero_point: stored code of the value 0.
        low: lowest stored code.
        high: highest stored code.
        dtype: container, 8 bits wide up to 8 bits and 16 above, signed for signed grids.
    """

    scale: Tensor
    bits: int
    grid: GridKind
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    @property
    def fills_container(self) -> bool:
        """True if saturation of the container alone is the truncation."""
        info = torch.iinfo(self.dtype)
        return (self.low, self.high) == (info.min, info.max)


#: Both operands of a product, by their names in the deployed model: ``"x"`` and ``"y"``.
PortableProduct = dict[str, PortableInput]


@dataclass(frozen=True)
class PortableLayer:
    """A deployed layer's numbers, see the head of this file.

    Attributes:
        weight: whole codes, int8 or int16.
        weight_scale: float32, above zero, no dimensions or one per output channel.
        bias: float32, one per output channel, or None.
        weight_bits: bit-width.
        code_bits: bits of a symmetric grid that holds all codes in either sign.
        input: quantization of the input; None when it stays float.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    weight_bits: int
    code_bits: int
    input: PortableInput | None


def portable(layer: Deployed, name: str = "layer") -> PortableLayer:
    """The portable numbers of a deployed layer, on the CPU; the name is for messages.

    Raises:
        NonFiniteError: if a weight scale leaves the range of float32.
        ConfigError: if the lowest code of a full grid fits no container once its sign is changed.
    """
    weight, scale = layer.weight_codes.cpu(), layer.scale.cpu()
    bias = None if layer.offset is None else layer.offset.cpu()
    code_bits = layer.code_bits
    if code_bits > MOST_BITS:
        raise ConfigError(
            f"{name}: expected weight codes that fit {MOST_BITS} bits in either sign, found a {layer.weight_grid} grid "
            f"of {layer.weight_bits} bits. Train it with Rule({name!r}, weight_levels='symmetric'), or save it with "
            "nipq.save, as arrays or as a .pt2 program."
        )
    if isinstance(layer, DeployedWeightOnlyLayer):
        given = portable_input(layer) if isinstance(layer, DeployedKeptLayer) else None
        scale = scale.reshape(()) if len(scale) == 1 else scale
        return PortableLayer(weight, scale, bias, layer.weight_bits, code_bits, given)
    step = layer.input_step.cpu().reshape(())
    weight_scale = (scale.double().abs() / step.double()).float()
    if not bool(torch.isfinite(weight_scale).all()):
        raise NonFiniteError(
            f"{name}: expected scale / input_step within the range of float32, found infinity. "
            "Look at the batch norm after the layer: its running variance may have collapsed."
        )
    dead = weight_scale == 0
    if code_bits > 8:  # the lowest code of a full grid may have to change its sign
        weight = weight.to(torch.int16)
    sign = torch.where(dead, 0, scale.sign()).to(weight.dtype)
    weight, weight_scale = weight * along_channels(sign, layer.layer, weight), torch.where(dead, 1.0, weight_scale)
    return PortableLayer(weight, weight_scale, bias, layer.weight_bits, code_bits, portable_input(layer))


def portable_layers(deployed: nn.Module) -> dict[str, PortableLayer]:
    """The portable numbers of every deployed layer by full name; equal weights of tied layers are one tensor."""
    found: dict[str, PortableLayer] = {}
    weights: dict[int, list[Tensor]] = {}
    for name, layer in deployed_layers(deployed).items():
        numbers = portable(layer, name)
        known = weights.setdefault(layer.weight_codes.data_ptr(), [])
        same = next((weight for weight in known if torch.equal(weight, numbers.weight)), None)
        if same is None:
            known.append(numbers.weight)
        else:
            numbers = replace(numbers, weight=same)
        found[name] = numbers
    return found


def portable_products(deployed: nn.Module) -> dict[str, PortableProduct]:
    """The portable operands of every product inside attention by full name; empty unless ``attention_bits`` was set."""
    return {
        name: {
            part: given
            for part, operand in product.operands().items()
            if (given := portable_input(operand)) is not None
        }
        for name, product in deployed_products(deployed).items()
    }


def portable_input(given: Deployed | DeployedOperand) -> PortableInput | None:
    """Quantization of the input of a layer, or of an operand; the scale is on the CPU. None if it stays float."""
    step: Tensor | None
    bits: int | None
    if isinstance(given, DeployedOperand):
        step, bits = given.step, given.bits
    elif isinstance(given, (DeployedLayer, DeployedKeptLayer)):
        step, bits = given.input_step, given.input_bits
    else:
        return None
    if step is None or bits is None:
        return None
    narrow, z = bits <= 8, given.zero_point
    if given.grid == "signed":
        dtype = torch.int8 if narrow else torch.int16
    else:
        dtype = torch.uint8 if narrow else torch.uint16
    scale = step.cpu().reshape(()).clone()
    return PortableInput(scale, bits, given.grid, z, given.code_low + z, given.code_high + z, dtype)


def input_facts(given: PortableInput | None) -> dict[str, Any]:
    """Facts of an input as files name them, all None if it stays float; codes count from the value 0."""
    names = ("input_bits", "grid", "zero_point", "code_low", "code_high")
    if given is None:
        return dict.fromkeys(names)
    z = given.zero_point
    return dict(zip(names, (given.bits, given.grid, z, given.low - z, given.high - z), strict=True))


def plain_kind(layer: nn.Module) -> str | None:
    """The torch class whose forward a layer runs, or None for a subclass with a forward of its own."""
    kind = kind_of(layer)
    return kind.__name__ if kind is not None and is_plain(layer) else None
