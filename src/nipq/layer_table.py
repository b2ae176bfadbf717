"""The typed rows that loss, snap, report and file size all read: one row per prepared layer."""

from __future__ import annotations

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
        weight: quantizer of its weight; the same object for layers that share a weight.
        input: quantizer of its input, or None when the input stays float.
    """

    spec: LayerSpec
    layer: nn.Module
    weight: WeightQuantizer
    input: InputQuantizer | None

    @property
    def name(self) -> str:
        """Full name of the layer in the model."""
        return self.spec.name


def layer_table(model: nn.Module) -> list[LayerRow]:
    """Rows of a prepared model, in the order of ``model.named_modules()``.

    Args:
        model: a model that ``prepare_`` has changed.

    Returns:
        One row per prepared layer.

    Raises:
        OrderError: if the model holds no prepared layer.
    """
    rows = []
    for layer in model.modules():
        if is_prepared(layer):
            record = quantization(layer)
            rows.append(LayerRow(record.spec, layer, weight_quantizer(layer), record.input))
    if not rows:
        raise OrderError(
            f"{type(model).__name__}: expected a prepared model, found no quantizer. "
            "Call nipq.prepare_(model, example_inputs) first."
        )
    return rows


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
