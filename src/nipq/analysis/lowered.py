"""A trained network at fewer bits than it was trained for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nipq.analysis.network import Scores, differentiable, input_samples, intact
from nipq.analysis.sweep import Point, Sweep
from nipq.errors import OrderError
from nipq.functional.clipping import SAMPLE_SIZE, noise_optimal_boundary
from nipq.functional.packing import FEWEST_BITS
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import inputs_of, to_device
from nipq.prepare.layer_table import LayerRow, layer_table, quantizers
from nipq.prepare.trace import call_model

Boundaries = Literal["kept", "refit"]


@contextmanager
def lowered_bits(
    model: nn.Module, by: int, *, boundaries: Boundaries = "kept", batches: Iterable[Any] | None = None
) -> Iterator[None]:
    """Lower every bit-width inside; afterwards the network is what it was, to the bit.

    No bit-width goes below 2, and the model's own input keeps its own: it is the source's.

    Args:
        model: a prepared model whose bits are frozen.
        by: bits taken from every tensor.
        boundaries: ``"kept"`` as they were trained, steps get wider; ``"refit"``, those of least noise error at the
            lower bits (T6 in docs/paper_map.md), on the same grids.
        batches: from which inputs' boundaries are fitted anew; their first item is the model's input.

    Yields:
        Nothing.

    Raises:
        OrderError: if a bit-width is not frozen, or batches are missing.
    """
    rows = layer_table(model)
    learned = next((quantizer.name for quantizer in quantizers(model) if not quantizer.is_frozen), None)
    if learned is not None:
        raise OrderError(
            f"{learned}: expected a trained model with frozen bits, found one that is still learned. "
            "Call nipq.freeze_bits_(model) first."
        )
    if boundaries == "refit" and batches is None:
        raise OrderError(
            f"{type(model).__name__}: expected batches to fit boundaries anew, found none. "
            'Give batches=, or boundaries="kept".'
        )
    values = _values(model, rows, batches or ()) if boundaries == "refit" else {}
    inputs = [row.input for row in rows if row.input is not None and not row.spec.is_input]
    lowered: list[TensorQuantizer] = list(dict.fromkeys([*(row.weight for row in rows), *inputs]))
    # Methods that take a boundary from the tensor at every forward do so only while it is not a learned one.
    with intact(model), differentiable([quantizer.alpha_raw for quantizer in lowered]):
        for quantizer in lowered:
            bits = max(FEWEST_BITS, quantizer.bits_rounded - by)
            quantizer.bits_frozen.fill_(bits)
            if quantizer.name in values:
                axis = quantizer.channel_axis if quantizer.alpha_raw.numel() > 1 else None
                x = values[quantizer.name]
                quantizer.set_alpha_(noise_optimal_boundary(x, float(bits), quantizer.grid, channel_axis=axis))
        yield


@torch.no_grad()
def _values(model: nn.Module, rows: Sequence[LayerRow], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Weights, and samples of the inputs as the quantized network computes them."""
    device = next(model.parameters()).device
    inputs = [to_device(inputs_of(batch), device) for batch in batches]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = input_samples(
            {row.input.name: row.input for row in rows if row.input is not None},
            lambda: [call_model(model, one) for one in inputs],
            max(1, SAMPLE_SIZE // max(1, len(inputs))),
        )
    finally:
        for module, training in modes.items():
            module.training = training
    for row in rows:
        if not row.spec.is_product:
            found[row.weight.name] = float_weight(row.layer).detach()
    return found


def lowered_sweep(
    model: nn.Module,
    batches: Iterable[Any],
    scores: Scores,
    *,
    by: Sequence[int] = (1, 2),
    fitting: Iterable[Any] | None = None,
) -> Sweep:
    """Score a trained network at fewer and fewer bits.

    Args:
        model: a prepared model whose bits are frozen; not changed.
        batches: what it is scored on, read many times.
        scores: of the model on batches.
        by: how many bits are taken.
        fitting: batches to fit boundaries on; measured with kept boundaries only if left out.

    Returns:
        Points with ``by`` and ``boundaries``; the first is the network as trained.
    """
    points = [Point({"by": 0, "boundaries": "kept"}, scores(model, batches))]
    ways: tuple[Boundaries, ...] = ("kept",) if fitting is None else ("kept", "refit")
    for boundaries in ways:
        for bits in by:
            with lowered_bits(model, bits, boundaries=boundaries, batches=fitting):
                points.append(Point({"by": bits, "boundaries": boundaries}, scores(model, batches)))
    return Sweep("lowered", tuple(points))
