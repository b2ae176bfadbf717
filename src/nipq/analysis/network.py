"""What every measurement needs of a network, prepared or not: its weights, its layers' inputs, its float twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nipq.config import Phase
from nipq.functional.clipping import even_stride
from nipq.nn.kinds import is_supported, is_table
from nipq.nn.layers import float_weight, is_prepared
from nipq.prepare.layer_table import set_phase_, weight_table
from nipq.prepare.prepare import restore_

#: Scores of a model on batches, such as ``nipq.train.task.Task.scores``; in evaluation mode, without gradients.
Scores = Callable[[nn.Module, Iterable[Any]], dict[str, float]]

#: The loss of a batch from the model's outputs and the targets: a mean over the samples.
LossFn = Callable[[Any, Any], Tensor]


def is_quantized(model: nn.Module) -> bool:
    """Whether ``prepare_`` has changed any layer of the model."""
    return any(is_prepared(module) for module in model.modules())


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights and inputs are measured, by name: the quantized ones, or all that could be.

    Args:
        model: prepared or not.

    Returns:
        Convolutions and linear layers in the order of their registration.
    """
    quantized = is_quantized(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_supported(module) and not is_table(module) and (is_prepared(module) or not quantized)
    }


def stored_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The float weight of each layer, as the optimizer sees it; a shared one once.

    Args:
        model: prepared or not.

    Returns:
        Parameters by ``"<layer>.weight"``.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, layer in layers(model).items():
        weight = float_weight(layer)
        found.setdefault(id(weight), (f"{name}.weight".lstrip("."), weight))
    return dict(found.values())


@torch.no_grad()
def float_twin(model: nn.Module, *, quantized: bool = True) -> nn.Module:
    """A copy of the network without quantizers, in evaluation mode, no parameter of which asks for gradients.

    Args:
        model: prepared or not; not changed.
        quantized: the copy's weights are Q(w), those that the prepared model computes with; else its float weights.

    Returns:
        The copy; inputs are not quantized in it.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    if not is_quantized(twin):
        return twin
    set_phase_(twin, Phase.ROUND if quantized else Phase.FLOAT)
    rows = weight_table(twin)
    values = [weight(float_weight(row.layer)).clone() for row, weight in rows]
    restore_(twin)
    for (row, _), value in zip(rows, values, strict=True):
        float_weight(row.layer).copy_(value)
    return twin


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters ask for gradients meanwhile."""
    before = [(p, p.requires_grad) for p in parameters]
    for p, _ in before:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


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


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a function see and replace the first tensor that a module is called with.

    Args:
        module: any; for a quantized layer the function gets the quantized input.
        change: from the input to what the module computes with.

    Returns:
        A handle whose ``remove`` ends it.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def input_samples(modules: Mapping[str, nn.Module], run: Callable[[], object], most: int) -> dict[str, Tensor]:
    """An evenly spaced sample of what each module is called with.

    Args:
        modules: by name.
        run: whatever calls them, such as a forward of the network.
        most: values kept of each call, about.

    Returns:
        One vector for each module that was called, its calls one after the other.
    """
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            flat = x.detach().flatten()
            kept.setdefault(name, []).append(flat[:: even_stride(flat.numel(), most)].clone())
            return x

        return change

    handles = [on_input(module, keep(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}
