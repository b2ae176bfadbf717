"""Parameter groups for any optimizer, and checks that an optimizer and a model belong together."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nipq.errors import ConfigError, OrderError
from nipq.nn.layers import check_module
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import quantizers

#: Default learning rates of clipping ranges and bit-widths, in units of the weights'; the release has one rate for all.
RANGE_RATE, BITS_RATE = 1.0, 1.0

#: Number of names that a message lists.
_NAMED = 3


def weight_groups(model: nn.Module, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups of everything that is no quantizer parameter, of a float or a prepared model.

    Args:
        model: any model.
        lr: learning rate; the optimizer's if left out.
        weight_decay: decay of tensors with two axes or more; norms, biases and other vectors get none.

    Returns:
        Groups named ``"weights"`` and ``"no_decay"``; empty ones left out.
    """
    check_module(model, "param_groups")
    own = {id(p) for module in model.modules() if isinstance(module, TensorQuantizer) for p in module.parameters()}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    rate = {} if lr is None else {"lr": lr}
    return _non_empty(
        {"name": "weights", "params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay} | rate,
        {"name": "no_decay", "params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0} | rate,
    )


def param_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    range_lr: float | None = None,
    bits_lr: float | None = None,
    range_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights, what is not decayed, clipping ranges, bit-widths.

    ::

        torch.optim.SGD(nipq.param_groups(model), lr=0.02, momentum=0.9)

    Without ``lr`` the optimizer's own rate holds for all groups, and those of ranges and bits carry a ``"lr_scale"``,
    which :class:`nipq.QATSession` multiplies their rate with. Quantizer parameters get no weight decay: it would pull
    every range to softplus(0) and every bit-width to the middle of its range. Only PACT asks for one, on the ranges,
    which is its penalty on alpha where alpha is large enough to equal alpha_raw.

    Paper: Q16 and Q17 in the paper map.

    Args:
        model: a prepared model.
        lr: learning rate of weights, norms and biases; the optimizer's if left out.
        weight_decay: decay of weights with two axes or more.
        range_lr: learning rate of clipping ranges; :data:`RANGE_RATE` times that of the weights if left out.
        bits_lr: learning rate of bit-widths; :data:`BITS_RATE` times that of the weights if left out.
        range_decay: decay of clipping ranges, for PACT.

    Returns:
        Up to four groups, named ``"weights"``, ``"no_decay"``, ``"ranges"`` and ``"bits"``; empty ones left out,
        except that bits which were learned and are frozen leave an empty group, as :func:`drop_frozen_` does: groups do
        not depend on the place in training, so states of optimizers and schedulers fit when training resumes.

    Raises:
        OrderError: if the model is not prepared, so that its quantizers' parameters would be missed.
    """
    found = quantizers(model)
    learned = [(name, p) for q in found for name, p in q.named_parameters() if p.requires_grad]
    bits = list(dict.fromkeys(parameter for name, parameter in learned if name == "bit_raw"))  # some are shared
    ranges = [parameter for name, parameter in learned if name != "bit_raw"]  # alpha_raw, and LSQ+'s offset
    groups = weight_groups(model, lr, weight_decay) + _non_empty(
        {"name": "ranges", "params": ranges, "weight_decay": range_decay} | _rate(range_lr, lr, RANGE_RATE)
    )
    if bits or any(quantizer.is_frozen and quantizer.bit_range.fixed is None for quantizer in found):
        groups.append({"name": "bits", "params": bits, "weight_decay": 0.0} | _rate(bits_lr, lr, BITS_RATE))
    return groups


def _rate(own: float | None, lr: float | None, ratio: float) -> dict[str, float]:
    if own is not None:
        return {"lr": own}
    return {"lr_scale": ratio} if lr is None else {"lr": ratio * lr}


def scale_rates_(*optimizers: Optimizer) -> None:
    """Multiply the learning rate of groups that carry a ``"lr_scale"`` with it, once.

    Args:
        *optimizers: built from :func:`param_groups` without ``lr``.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.pop("lr_scale", 1.0)


def without_bits(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the bits: what gradient clipping should see.

    The price of a budget that is hard to meet may grow until the bits' gradient is thousands of times all others. A
    norm that counts it would scale those to nothing, for weights that have no share in it.

    Args:
        model: a prepared model, in any phase.

    Returns:
        Parameters, for ``torch.nn.utils.clip_grad_norm_``.
    """
    return [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] != "bit_raw"]


def check_optimizer(model: nn.Module, *optimizers: Optimizer) -> None:
    """Refuse optimizers that were built before the model was prepared, or before its bits were frozen.

    Args:
        model: a prepared model.
        *optimizers: all optimizers of the loop.

    Raises:
        OrderError: naming parameters that no optimizer holds, or saying how many held ones are no longer the model's.
    """
    quantizers(model)  # refuses a model that is not prepared
    held = {id(parameter) for parameter in _held(*optimizers)}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OrderError(
            f"{type(model).__name__}: expected an optimizer with every parameter of the model, found that it lacks "
            f"{_some(missing)}. Build it from nipq.param_groups(model, lr=...) after nipq.prepare_."
        )
    own = {id(parameter) for parameter in model.parameters()}
    stale = [tuple(parameter.shape) for parameter in _held(*optimizers) if id(parameter) not in own]
    if stale:
        raise OrderError(
            f"{type(model).__name__}: expected an optimizer with parameters of this model only, found {len(stale)} of "
            f"another one or frozen since (shapes {_some(stale)}). "
            "Call nipq.qat.optim.drop_frozen_(optimizer, model), or build a new optimizer."
        )


def learn_quantizers_(model: nn.Module) -> nn.Module:
    """Let bit-widths and clipping ranges be learned again, where the method does, after ``requires_grad_(False)``.

    Freezing a whole model, as PEFT's ``get_peft_model`` does, stops its quantizers, too.

    Args:
        model: a prepared model.

    Returns:
        The same model.
    """
    for parameter in _learnable(model).values():
        parameter.requires_grad_(True)
    return model


def check_learned(model: nn.Module) -> None:
    """Refuse bit-widths and clipping ranges that were meant to be learned and require no gradient.

    Args:
        model: a prepared model.

    Raises:
        OrderError: naming them.
    """
    stopped = [name for name, parameter in _learnable(model).items() if not parameter.requires_grad]
    if stopped:
        raise OrderError(
            f"{type(model).__name__}: expected clipping ranges and bit-widths that are learned, found {len(stopped)} "
            f"without gradients ({_some(stopped)}), as after requires_grad_(False) or PEFT's get_peft_model. Call "
            "nipq.qat.optim.learn_quantizers_(model) before the optimizer is built, or fix bit-widths by "
            "nipq.freeze_bits_ and ranges by Config."
        )


def _learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of quantizers that their method learns, by name."""
    return {
        f"{quantizer.name}.{name}": parameter
        for quantizer in quantizers(model)
        for name, parameter in quantizer.named_parameters()
        if name != "alpha_raw" or quantizer.learns_range
    }


def check_decay_of_ranges(model: nn.Module, *optimizers: Optimizer) -> None:
    """Refuse weight decay on clipping ranges and bit-widths in groups that :func:`param_groups` did not make.

    It pulls every range to softplus(0) and every bit-width to the middle of its range.

    Args:
        model: a prepared model.
        *optimizers: all optimizers of the loop.

    Raises:
        ConfigError: naming the parameters.
    """
    own = {
        id(parameter): f"{quantizer.name}.{name}"
        for quantizer in quantizers(model)
        for name, parameter in quantizer.named_parameters()
    }
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    decayed = [
        own[id(parameter)]
        for group in groups
        if group.get("weight_decay") and group.get("name") != "ranges"  # asked for by range_decay
        for parameter in group["params"]
        if id(parameter) in own and parameter.requires_grad
    ]
    if decayed:
        raise ConfigError(
            f"{type(model).__name__}: expected no weight decay on clipping ranges and bit-widths, found it on "
            f"{_some(decayed)}; it would pull them to the same values whatever the data. Build the optimizer from "
            "nipq.param_groups(model, weight_decay=...), or give them a group with weight_decay=0."
        )


def check_float32(model: nn.Module) -> None:
    """Refuse clipping ranges and bit-widths in half precision.

    Args:
        model: a prepared model.

    Raises:
        ConfigError: naming the first one.
    """
    for quantizer in quantizers(model):
        if quantizer.alpha_raw.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"{quantizer.name}: expected clipping ranges and bit-widths in float32, found "
                f"{quantizer.alpha_raw.dtype}; half precision would swallow their steps. "
                "Train with autocast (mixed precision) instead."
            )


def drop_frozen_(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Take parameters that are no longer the model's out of an optimizer, with their momentum.

    After ``freeze_bits_`` the bit parameters are gone from the model; here they leave the optimizer. Everything else
    keeps its state. A group that is left empty stays: learning-rate schedulers hold one number for each group.

    Args:
        optimizer: any torch optimizer.
        model: the model after freezing.

    Returns:
        The same optimizer.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for parameter in _held(optimizer):
        if id(parameter) not in own:
            optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
    return optimizer


def drop_frozen_on_load_(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Let an optimizer drop frozen parameters by itself before it loads a state.

    A model that loads the checkpoint of a fine-tune stage freezes its bits; an optimizer that was built before still
    holds them, and would refuse a state that does not.

    Args:
        optimizer: any torch optimizer.
        model: its model.

    Returns:
        The handle of the hook.
    """

    def drop(own: Optimizer, state: dict[str, Any]) -> None:
        if _sizes(own.param_groups) != _sizes(state["param_groups"]):  # else it is its own state, moved to a device
            drop_frozen_(own, model)

    return optimizer.register_load_state_dict_pre_hook(drop)


def _held(*optimizers: Optimizer) -> list[nn.Parameter]:
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return [parameter for group in groups for parameter in group["params"]]


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _non_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _some(items: list[Any]) -> str:
    return ", ".join(map(str, items[:_NAMED])) + (", ..." if len(items) > _NAMED else "")
