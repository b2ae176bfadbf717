"""First boundaries and grids of the inputs, from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed import (
    all_or_none,
    broadcast_,
    check_same_,
    from_rank_zero,
    gather_objects,
    gather_samples,
    inner,
    is_distributed,
    is_sharded,
    rank,
    whole,
    world_size,
)
from nipq.errors import ConfigError, OrderError
from nipq.functional.sampling import even_stride
from nipq.nn.init import start_input_boundary_, start_weight_boundary_
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import InputQuantizer
from nipq.phases import Phase
from nipq.prepare.control import phase_of, set_phase_
from nipq.prepare.layer_table import input_quantizers, layer_table, weight_table
from nipq.prepare.trace import ExampleInputs, call_model, tensors_in

#: Values kept of each input over all batches; the squared error of a boundary is known to a per cent from far fewer.
SAMPLE_SIZE = 65_536


def inputs_of(batch: Any) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
    """What the model is called with, out of what a loader yields.

    Args:
        batch: a tensor; a tuple or list whose first item is the model's input; or a mapping of keyword inputs.

    Returns:
        The input.

    Raises:
        ConfigError: if no tensor is found there.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("label", "labels", "target")}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        return inputs_of(batch[0])
    raise ConfigError(
        f"loader: expected batches of tensors, found {type(batch).__name__}. "
        "Let it yield a tensor, a tuple or list with the input first, or a dict of keyword inputs."
    )


def to_device(inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    """Move example inputs to a device, in any of their accepted forms."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return [value.to(device) if isinstance(value, Tensor) else value for value in inputs]


def in_step(loader: Iterable[Any], what: str) -> Iterator[tuple[ExampleInputs, float]]:
    """Inputs while every rank has some.

    Args:
        loader: batches, see :func:`inputs_of`.
        what: what they are for, for the message.

    Yields:
        Inputs, and how many samples all ranks have for each of this one.

    Raises:
        ConfigError: if a batch holds no tensor.
        DistributedError: if the loader of another rank failed.
    """
    if not is_distributed():
        yield from ((inputs_of(batch), 1.0) for batch in loader)
        return
    batches = iter(loader)
    while True:
        with all_or_none(what):
            batch = next(batches, None)
            inputs = None if batch is None else inputs_of(batch)
            own = 0 if inputs is None else _samples(inputs)
        sizes = gather_objects(own)
        if inputs is None or not all(sizes):
            return
        yield inputs, sum(sizes) / own


def _samples(inputs: ExampleInputs) -> int:
    first = next(tensors_in(inputs), None)
    if first is None:
        raise ConfigError("loader: expected a tensor in every batch, found none. Let it yield the model's inputs.")
    return len(first)


@torch.no_grad()
def calibrate_(model: nn.Module, loader: Iterable[Any], batches: int = 8) -> nn.Module:
    """Start every boundary afresh: the inputs' grids and boundaries from data, the weights' from the weights.

    Runs the float model (evaluation mode, phase ``"float"``) and keeps an evenly spaced sample of each input. Modes and
    phase are restored. Boundaries are set for the bit-widths of the moment, so calibrate after ``set_bits_`` and after
    loading a float checkpoint. A layer that these batches never reach is an error, not a silent default.

    With several ranks each gives batches of its own and all end with the same grids and boundaries: those of the
    samples of all of them. Where the ranks' batches are equal slices of larger ones, they are what one process takes
    from these.

    Args:
        model: a prepared model.
        loader: batches, see :func:`inputs_of`; only the first ``batches`` are read, on each rank. Of a sharded model
            the rank with the fewest says how many.
        batches: how many batches to read, at least 1.

    Returns:
        The same model.

    Raises:
        OrderError: if the model is not prepared, or a layer was not reached.
        ConfigError: if the loader is empty or yields no tensors.
        NonFiniteError: if an activation is not finite.
        DistributedError: if ranks hold different models, or one of them failed.
    """
    rows = layer_table(model)
    check_same_(model, "calibrate_")
    samples: dict[InputQuantizer, list[Tensor]] = {quantizer: [] for quantizer in input_quantizers(rows)}
    share = max(1, SAMPLE_SIZE // max(1, batches))
    own, ranks = rank(), world_size()

    def keep(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, InputQuantizer)
        flat = args[0].detach().flatten()
        stride = even_stride(flat.numel() * ranks, share)
        start = -own * flat.numel() % stride  # as if the ranks' batches were one
        samples[quantizer].append(flat[start::stride].clone())

    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    phase = phase_of(model)
    handles = [quantizer.register_forward_pre_hook(keep) for quantizer in samples]
    try:
        model.eval()
        set_phase_(model, Phase.FLOAT)
        if any(is_sharded(parameter) for parameter in model.parameters()):  # every forward needs all ranks
            _read(model, (inputs for inputs, _ in in_step(islice(loader, batches), "calibrate_")), batches)
        else:
            with all_or_none("calibrate_"):
                _read(inner(model), loader, batches)
    finally:
        for handle in handles:
            handle.remove()
        set_phase_(model, phase)
        for module, training in modes.items():
            module.training = training
    for row, weight in weight_table(model):
        start_weight_boundary_(weight, whole(float_weight(row.layer)))
    for quantizer, kept in samples.items():
        sample = gather_samples(torch.cat(kept) if kept else torch.empty(0, device=device), 2 * SAMPLE_SIZE)
        if not sample.numel():
            raise OrderError(
                f"{quantizer.name}: expected the calibration batches to reach it, found that none did. "
                "Give batches that use the whole model, or exclude the layer with Rule(name, quantize=False)."
            )
        start_input_boundary_(quantizer, sample)
    # Every rank computed them from the same numbers; other hardware may still have rounded them differently.
    broadcast_(quantizer.alpha_raw for row in rows for quantizer in (row.weight, row.input) if quantizer is not None)
    for quantizer, grid in zip(samples, from_rank_zero(lambda: [found.grid for found in samples]), strict=True):
        quantizer.grid = grid
    return model


def _read(model: nn.Module, loader: Iterable[Any], batches: int) -> None:
    """Run the model on the first batches."""
    device = next(model.parameters()).device
    read = 0
    for batch in loader:
        call_model(model, to_device(inputs_of(batch), device))
        read += 1
        if read >= batches:
            break
    if read == 0:
        raise ConfigError("calibrate_: expected at least one batch, found an empty loader. Give some training data.")
