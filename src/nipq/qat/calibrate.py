"""Calibrate activation clipping ranges and grids from data, and weight ranges from the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.distributed import (
    all_or_none,
    broadcast_,
    check_same_,
    from_rank_zero,
    gather_samples,
    inner,
    is_sharded,
    rank,
    whole,
    world_size,
)
from nipq.errors import ConfigError, NonFiniteError, OrderError
from nipq.functional.clipping import SAMPLE_SIZE, even_stride
from nipq.nn.init import start_input_range_, start_weight_range_
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.batches import BatchReader, Inputs, evaluating, to_device
from nipq.prepare.input_form import ExampleInputs, tensors_in
from nipq.prepare.layer_table import input_quantizers, layer_table, phase_of, set_phase_, weight_table


@torch.no_grad()
def calibrate_(model: nn.Module, loader: Iterable[Any], batches: int = 8, *, inputs: Inputs | None = None) -> nn.Module:
    """Calibrate all clipping ranges: the inputs' grids and ranges from data, the weights' ranges from the weights.

    Runs the float model (evaluation mode, phase ``"float"``) and keeps an evenly spaced sample of each input. Modes and
    phase are restored. Ranges are set for the bit-widths of the moment, so calibrate after ``set_bits_`` and after
    loading a float checkpoint. A layer that these batches never reach is an error, not a silent default.

    With several ranks each gives batches of its own and all end with the same grids and ranges: those of the
    samples of all of them. Where the ranks' batches are equal slices of larger ones, they are what one process takes
    from these.

    Args:
        model: a prepared model.
        loader: batches; only the first ``batches`` are read, on each rank. Of a sharded model the rank with the fewest
            says how many.
        batches: how many batches to read, at least 1.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        The same model.

    Raises:
        OrderError: if the model is not prepared, or a layer was not reached.
        ConfigError: if the loader is empty, or a batch is not what the model takes.
        NonFiniteError: if an input or an activation is not finite.
        DistributedError: if ranks hold different models, or one of them failed.
    """
    if batches < 1:
        raise ConfigError(f"calibrate_: expected batches of at least 1, found {batches}. Raise it.")
    rows = layer_table(model)
    check_same_(model, "calibrate_")
    reader = BatchReader(model, inputs, "calibrate_")
    samples: dict[InputQuantizer, list[Tensor]] = {quantizer: [] for quantizer in input_quantizers(rows)}
    share = max(1, SAMPLE_SIZE // batches)
    own, ranks = rank(), world_size()
    finite: dict[str, Tensor] = {}

    def keep(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, InputQuantizer)
        flat = args[0].detach().flatten()
        stride = even_stride(flat.numel() * ranks, share)
        start = -own * flat.numel() % stride  # as if the ranks' batches were one
        samples[quantizer].append(flat[start::stride].clone())
        name, sound = quantizer.name, torch.isfinite(flat).all()
        finite[name] = finite[name] & sound if name in finite else sound  # one layer may be called several times

    def run(where: str, given: ExampleInputs, network: nn.Module) -> ExampleInputs:
        given = to_device(given, device)
        reader.call(network, given, where)
        return given

    device = next(model.parameters()).device
    phase = phase_of(model)
    handles = [quantizer.register_forward_pre_hook(keep) for quantizer in samples]
    try:
        with evaluating(model):
            set_phase_(model, Phase.FLOAT)
            if any(is_sharded(parameter) for parameter in model.parameters()):  # every forward needs all ranks
                for where, given, _ in reader.in_step(loader, batches):
                    given = run(where, given, model)
                    with all_or_none("calibrate_"):
                        _check_finite(where, given, finite)
            else:
                with all_or_none("calibrate_"):
                    for where, batch in reader.read(loader, batches):
                        _check_finite(where, run(where, reader.inputs(batch, where), inner(model)), finite)
    finally:
        for handle in handles:
            handle.remove()
        set_phase_(model, phase)
    for row, weight in weight_table(model):
        start_weight_range_(weight, whole(float_weight(row.layer)))
    for quantizer, kept in samples.items():
        sample = gather_samples(torch.cat(kept) if kept else torch.empty(0, device=device), 2 * SAMPLE_SIZE)
        if not sample.numel():
            raise OrderError(
                f"{quantizer.name}: expected the calibration batches to reach it, found that none did. "
                "Give batches that use the whole model, or exclude the layer with Rule(name, quantize=False)."
            )
        start_input_range_(quantizer, sample)
    # Every rank computed them from the same numbers; other hardware may still have rounded them differently.
    broadcast_(quantizer.alpha_raw for row in rows for quantizer in (row.weight, row.input) if quantizer is not None)
    for quantizer, grid in zip(samples, from_rank_zero(lambda: [found.grid for found in samples]), strict=True):
        quantizer.grid = grid
    return model


def _check_finite(where: str, inputs: ExampleInputs, reached: dict[str, Tensor]) -> None:
    """Refuse a batch with NaN in it, or one that made an activation NaN or infinite; waits for the device once."""
    floats = [tensor for tensor in tensors_in(inputs) if tensor.is_floating_point()]
    sound = [~torch.isnan(tensor).any() for tensor in floats]  # infinity may stand in a mask
    names, flags = ["the model's own input"] * len(sound) + list(reached), [*sound, *reached.values()]
    reached.clear()
    if not flags:
        return
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if all(found):
        return
    name = names[found.index(False)]
    bad = [
        number
        for tensor in floats
        if tensor.ndim
        for number, sample in enumerate(tensor.flatten(1) if tensor.ndim > 1 else tensor)
        if not bool(torch.isfinite(sample).all())
    ]
    samples = f" (sample {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})" if bad else ""
    raise NonFiniteError(
        f"{where}: {name}: expected finite numbers while calibrating, found NaN or infinity{samples}. "
        f"{'Leave such samples out, or mend them in the loader.' if bad else 'Check the float model and its inputs.'}"
    )
