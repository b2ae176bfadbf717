"""The optimizers of a stage: one for the model, and perhaps one for boundaries and bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nipq.distributed import like
from nipq.qat.optim import check_optimizer, param_groups, weight_groups

if TYPE_CHECKING:
    from nipq.train.config import OptimizerConfig

QUANTIZER_GROUPS = ("ranges", "bits")
ADAM_BETAS = (0.9, 0.999)
"""Of torch."""
FUSED = ("cuda",)
"""Devices on which a step is one kernel."""


class Optimizers:
    """The optimizers of a stage, stepped and saved together.

    Args:
        model: The model as it is in this stage (float, prepared, or frozen).
        config: The ``optimizer`` section.
        prepared: Whether the model has quantizers.
        lr: Peak learning rate of this stage, or ``None`` for the section's; those of boundaries and bits keep their
            ratio to it.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, prepared: bool, lr: float | None = None) -> None:
        """Group the parameters; every group remembers its peak learning rate."""
        peak = config.lr if lr is None else lr
        if prepared:
            boundary_lr, bits_lr = (
                None if rate is None else rate * peak / config.lr for rate in (config.boundary_lr, config.bits_lr)
            )
            found = param_groups(
                model,
                peak,
                config.weight_decay,
                range_lr=boundary_lr,
                bits_lr=bits_lr,
                range_decay=config.boundary_decay,
            )
            groups = [group for group in found if group["params"]]  # a stage builds anew: nothing waits for frozen bits
        else:
            groups = weight_groups(model, peak, config.weight_decay)
        for group in groups:
            group["peak"] = group["lr"]
            group |= _momentum(config, group["name"])
        own = QUANTIZER_GROUPS if config.quantizer_optimizer == "adam" else ()
        apart = [group for group in groups if group["name"] in own]
        self.all: list[Optimizer] = [_build(config, [group for group in groups if group["name"] not in own])]
        if apart:
            self.all.append(torch.optim.Adam(apart, fused=_fused(apart)))
        if prepared:
            check_optimizer(model, *self.all)

    def scale(self, factor: float) -> None:
        """Set every learning rate to its peak times a factor."""
        for group in self._groups():
            group["lr"] = group["peak"] * factor

    def step(self, skip: Tensor | None = None) -> None:
        """Apply the gradients and clear them.

        Args:
            skip: 1.0 to change nothing, float32, no dimensions, on the device; for fused optimizers only.
        """
        for optimizer in self.all:
            if skip is not None:
                optimizer.found_inf = skip  # type: ignore[attr-defined]  # what torch.amp.GradScaler tells them
            optimizer.step()
            optimizer.zero_grad()

    def adopt(self, previous: Optimizers) -> None:
        """Carry momentum over from the optimizers of the stage before, for parameters that still exist."""
        memory = {parameter: state for optimizer in previous.all for parameter, state in optimizer.state.items()}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in memory:
                        optimizer.state[parameter] = memory[parameter]

    def state_dict(self) -> list[dict[str, Any]]:
        """States of all optimizers."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over states of the same optimizers."""
        for optimizer, state in zip(self.all, states, strict=True):
            pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
            # the kernel is this device's, and torch puts step counts where it wants them
            groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
            optimizer.load_state_dict({**state, "param_groups": groups})
            for parameter, entries in optimizer.state.items():
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = like(value, parameter)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.all for group in optimizer.param_groups]


def _momentum(config: OptimizerConfig, group: str) -> dict[str, Any]:
    """Settings of a group with a momentum of its own, for each kind of optimizer."""
    momentum = {"ranges": config.boundary_momentum, "bits": config.bits_momentum}.get(group)
    if momentum is None:
        return {}
    if config.name == "sgd" and config.quantizer_optimizer == "same":
        return {"momentum": momentum, "nesterov": config.nesterov and momentum > 0}
    return {"betas": (momentum, ADAM_BETAS[1])}


def _build(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    fused = _fused(groups)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, fused=fused)


def _fused(groups: list[dict[str, Any]]) -> bool | None:
    """Whether to ask for one kernel a step, which can be told on the device to change nothing; else torch's choice."""
    return True if all(p.device.type in FUSED for group in groups for p in group["params"]) else None
