"""The typed rows that loss, snap, report and file size all read: one row per prepared layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nipq.errors import OrderError
from nipq.nn.layers import LayerSpec, is_prepared, quantization, weight_quantizer
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer, WeightQuantizer


@dataclass(frozen=True)
class LayerRow:
    """A prepared layer, its facts and its quantizers.

    Attributes:
        spec: counts per sample and the batch norm that can be folded.
        layer: the module itself.
        weight: quantizer of its weight; the same object for layers that share a weight. Of a product inside attention,
            quantizer of the second operand (key, value), which stands for a weight.
        input: quantizer of its input, or None when the input stays float.
        batchnorm: the batch norm that can be folded into it, as it is in the model now, or None.
    """

    spec: LayerSpec
    layer: nn.Module
    weight: TensorQuantizer
    input: InputQuantizer | None
    batchnorm: nn.Module | None = None

    @property
    def name(self) -> str:
        """Full name of the layer in the model."""
        return self.spec.name


def layer_table(model: nn.Module) -> list[LayerRow]:
    """Rows of a prepared model, in the order in which its layers run.

    Args:
        model: a model that ``prepare_`` has changed, a wrapper around one (names then differ by a prefix), or a part.

    Returns:
        One row per prepared layer.

    Raises:
        OrderError: if the model holds no prepared layer.
    """
    modules = dict(model.named_modules())
    layers = [(name, layer) for name, layer in modules.items() if is_prepared(layer)]
    if not layers:
        raise OrderError(
            f"{type(model).__name__}: expected a prepared model, found no quantizer. "
            "Call nipq.prepare_(model, example_inputs) first."
        )
    rows = []
    for name, layer in sorted(layers, key=lambda item: quantization(item[1]).order):
        record = quantization(layer)
        batchnorm = modules.get(_present_name(record.spec, name)) if record.spec.batchnorm else None
        rows.append(LayerRow(record.spec, layer, weight_quantizer(layer), record.input, batchnorm))
    return rows


def weight_table(model: nn.Module) -> list[tuple[LayerRow, WeightQuantizer]]:
    """Rows whose weight is stored, with its quantizer: all but the products inside attention.

    Args:
        model: as for :func:`layer_table`.
    """
    rows = layer_table(model)
    return [(row, row.weight) for row in rows if isinstance(row.weight, WeightQuantizer)]


def input_quantizers(rows: Sequence[LayerRow]) -> list[InputQuantizer]:
    """Quantizers of computed tensors: of each layer's input, and of keys and values.

    Args:
        rows: of :func:`layer_table`.
    """
    operands = [quantizer for row in rows for quantizer in (row.input, row.weight)]
    return [quantizer for quantizer in operands if isinstance(quantizer, InputQuantizer)]


def _present_name(spec: LayerSpec, name: str) -> str:
    """Name of the layer's batch norm inside a model that calls the layer ``name``, be it a wrapper or a part."""
    assert spec.batchnorm is not None
    if name.endswith(spec.name):
        return name.removesuffix(spec.name) + spec.batchnorm
    return spec.batchnorm.removeprefix(spec.name.removesuffix(name))


def quantizers(model: nn.Module) -> list[TensorQuantizer]:
    """Every quantizer of a prepared model once: of each layer the weight's, then the input's.

    Args:
        model: a prepared model.

    Returns:
        Quantizers without repetition (tied weights share one).

    Raises:
        OrderError: if the model holds no prepared layer.
    """
    found: dict[TensorQuantizer, None] = {}
    for row in layer_table(model):
        found[row.weight] = None
        if row.input is not None:
            found[row.input] = None
    return list(found)
