"""Gaussian noise on the weights, or on the activations, that a network computes with.

With z of independent normal numbers, a tensor x becomes ``x + strength * rms(x) * z``, rms(x) = sqrt(E[x^2]): a
strength of 0.1 has a hundredth of the tensor's power, whatever its scale. Of a quantized network it is the quantized
tensors that are perturbed, after rounding; noise before it would mostly be rounded away.

An activation's RMS may also be taken channel by channel. That is the fairer measure where some channels are always
zero: the batch norm behind such a channel divides by next to nothing, so noise on it of the other channels' strength
drowns everything, and one layer decides what the whole network seems to bear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nipq.analysis.network import Scores, intact, is_quantized, layers, on_input, stored_weights
from nipq.analysis.sweep import Point, Sweep
from nipq.config import Phase
from nipq.errors import OrderError
from nipq.nn.layers import float_weight
from nipq.prepare.layer_table import layer_table, phase_of


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
