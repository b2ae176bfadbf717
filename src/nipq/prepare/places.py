"""Where codes are looked at: the input of each layer, and both operands of each product inside attention."""

from __future__ import annotations

from collections.abc import Mapping

from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.layer_table import LayerRow

#: Operands of a product, as a deployed one calls them.
OPERANDS = ("x", "y")


def place_of(product: str, operand: str) -> str:
    """What an operand is called in evidence and in messages.

    Args:
        product: full name of the product.
        operand: one of :data:`OPERANDS`.

    Example:
        >>> place_of("layer.attention_products.mix", "y")
        'layer.attention_products.mix: y'
    """
    return f"{product}: {operand}"


def quantizers_at(name: str, row: LayerRow) -> dict[str, InputQuantizer]:
    """Quantizers of what a trained layer or product reads.

    Args:
        name: its full name.
        row: its row.

    Returns:
        Place -> quantizer; empty when the input stays float.
    """
    if row.input is None:
        return {}
    if not isinstance(row.weight, InputQuantizer):
        return {name: row.input}
    return {place_of(name, operand): found for operand, found in zip(OPERANDS, (row.input, row.weight), strict=True)}


def places(rows: Mapping[str, LayerRow]) -> list[str]:
    """All that evidence is kept of, in the order of execution; a product follows its operands.

    Args:
        rows: layers and products of the trained model by name.
    """
    return list(dict.fromkeys(place for name, row in rows.items() for place in (*quantizers_at(name, row), name)))
