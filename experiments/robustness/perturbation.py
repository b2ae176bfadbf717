"""Networks made worse: Gaussian noise on weights or activations, and fewer bits than they were trained for.

With z of independent normal numbers, a tensor x becomes ``x + strength * rms(x) * z``, rms(x) = sqrt(E[x^2]): a
strength of 0.1 has a hundredth of the tensor's power, whatever its scale. Of a quantized network it is the quantized
tensors that are perturbed, after rounding; noise before it would mostly be rounded away.

An activation's RMS may also be taken channel by channel. That is the fairer measure where some channels are always
zero: the batch norm behind such a channel divides by next to nothing, so noise on it of the other channels' strength
drowns everything, and one layer decides what the whole network seems to bear.

Every measurement takes a finished model, batches and a function that scores them, draws from its own seed, and leaves
the model as it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nipq.budget.hessian import differentiable, input_samples, is_quantized, layers, on_input, stored_weights
from nipq.config import Phase
from nipq.errors import OrderError
from nipq.functional.clipping import SAMPLE_SIZE, noise_optimal_range
from nipq.functional.packing import FEWEST_BITS
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import BatchReader, call_model, to_device
from nipq.prepare.layer_table import LayerRow, layer_table, phase_of, quantizers

#: Scores of a model on batches, such as ``nipq.train.task.Task.scores``; in evaluation mode, without gradients.
Scores = Callable[[nn.Module, Iterable[Any]], dict[str, float]]

Boundaries = Literal["kept", "refit"]


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        setting: changes of the model or its inputs, by name; strengths, seeds, kinds.
        scores: of the model, by name.
    """

    setting: dict[str, Any]
    scores: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """A series of measurements of one model.

    Attributes:
        measured: the property, such as ``"perturbation"``.
        points: in the order in which they were taken.
    """

    measured: str
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the values of parameters and buffers inside, they are bitwise what they were afterwards."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@contextmanager
def perturbed(
    model: nn.Module,
    *,
    weights: float = 0.0,
    activations: float = 0.0,
    relative_to: Literal["tensor", "channel"] = "tensor",
    seed: int = 0,
) -> Iterator[None]:
    """Perturb a network inside; afterwards it is what it was, to the bit.

    Args:
        model: prepared, in any phase but ``int``, or float. Its convolutions and linear layers are perturbed: the
            quantized ones if there are any, else all.
        weights: strength of the noise on each weight, units of its RMS; drawn once.
        activations: strength of the noise on the input of each layer, units of the RMS over the batch; drawn anew at
            every forward. The model's own input, as the first layer reads it, counts among them.
        relative_to: whether an activation's RMS is that of the tensor or that of each of its channels.
        seed: of the noise; models of one architecture get the same normal numbers.

    Yields:
        Nothing.

    Raises:
        OrderError: in phase ``int``.
    """
    quantized = is_quantized(model)
    if quantized and phase_of(model) is Phase.INT:
        raise OrderError(
            f'{type(model).__name__}: expected phase "round" to perturb, found "int", where weights are whole codes. '
            'Call set_phase_(model, "round") first.'
        )
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        if weights:
            stack.enter_context(intact(model))
            for name, weight in stored_weights(model).items():
                normal = torch.randn(weight.shape, generator=generator).to(weight)
                if quantized:
                    _perturb_quantized(stack, model, name, weights * normal)
                else:
                    with torch.no_grad():
                        weight.copy_(_moved(weight, weights * normal))
        if activations:
            for layer in layers(model).values():
                axis = _channel_axis(layer) if relative_to == "channel" else None
                stack.callback(on_input(layer, _noise(activations, axis, generator)).remove)
        yield


def _noise(strength: float, axis: int | None, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        return _moved(x, strength * torch.randn(x.shape, generator=generator).to(x), axis)

    return change


def _channel_axis(layer: nn.Module) -> int:
    """Axis of the input channels, counted from the end: weights of convolutions have two axes more than places."""
    return -1 if isinstance(layer, nn.Linear) else 1 - float_weight(layer).ndim


def _moved(x: Tensor, direction: Tensor, axis: int | None = None) -> Tensor:
    others = tuple(place for place in range(x.ndim) if axis is None or place != x.ndim + axis)
    return x + x.detach().square().mean(dim=others, keepdim=True).sqrt() * direction


def _perturb_quantized(stack: ExitStack, model: nn.Module, name: str, direction: Tensor) -> None:
    owner = model.get_submodule(name.removesuffix("weight").removesuffix("."))
    quantizer = next(row.weight for row in layer_table(model) if row.layer is owner)
    handle = quantizer.register_forward_hook(lambda _module, _args, out: _moved(out, direction))
    stack.callback(handle.remove)


def perturbation_sweep(
    model: nn.Module,
    batches: Iterable[Any],
    scores: Scores,
    *,
    weights: Sequence[float] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    activations: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    channels: Sequence[float] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    seeds: Sequence[int] = (0, 1, 2),
) -> Sweep:
    """Score a network under growing noise on its weights, and apart from that on its activations.

    Args:
        model: as for :func:`perturbed`; not changed.
        batches: what it is scored on, read many times.
        scores: of the model on batches.
        weights: strengths on weights.
        activations: strengths on activations, relative to the tensor.
        channels: strengths on activations, relative to each channel.
        seeds: one measurement of each strength for each seed.

    Returns:
        Points with ``kind`` (``none``, ``weights``, ``activations`` or ``channels``), ``strength`` and ``seed``; the
        first is the unperturbed network.
    """
    points = [Point({"kind": "none", "strength": 0.0, "seed": seeds[0]}, scores(model, batches))]
    for kind, strengths in (("weights", weights), ("activations", activations), ("channels", channels)):
        for strength in strengths:
            for seed in seeds:
                with perturbed(
                    model,
                    weights=strength if kind == "weights" else 0.0,
                    activations=0.0 if kind == "weights" else strength,
                    relative_to="channel" if kind == "channels" else "tensor",
                    seed=seed,
                ):
                    found = scores(model, batches)
                points.append(Point({"kind": kind, "strength": strength, "seed": seed}, found))
    return Sweep("perturbation", tuple(points))


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
            lower bits (T6 in docs/internals/paper-map.md), on the same grids.
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
                quantizer.set_alpha_(noise_optimal_range(x, float(bits), quantizer.grid, channel_axis=axis))
        yield


@torch.no_grad()
def _values(model: nn.Module, rows: Sequence[LayerRow], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Weights, and samples of the inputs as the quantized network computes them."""
    device = next(model.parameters()).device
    inputs = [to_device(BatchReader(model).inputs(batch), device) for batch in batches]
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
