"""Optimizers of a run from its config, and learning-rate schedules: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nipq.distributed import like
from nipq.qat.optim import param_groups, weight_groups

if TYPE_CHECKING:
    from nipq.train.config import OptimizerConfig, TrainConfig

#: Parameter groups that ``quantizer_optimizer: adam`` gives an optimizer of their own.
QUANTIZER_GROUPS = ("ranges", "bits")
#: Torch's default betas of Adam.
ADAM_BETAS = (0.9, 0.999)
#: Devices on which an optimizer step is one fused kernel.
FUSED = ("cuda",)


def make_optimizers(model: nn.Module, config: OptimizerConfig, *, prepared: bool) -> list[Optimizer]:
    """Build the optimizer of the model, and perhaps a second one for clipping ranges and bit-widths.

    Args:
        model: the float or the prepared model.
        config: the ``optimizer`` section.
        prepared: whether the model has quantizers.

    Returns:
        One or two optimizers at their peak learning rates.
    """
    if prepared:
        groups = param_groups(
            model, config.lr, config.weight_decay,
            range_lr=config.range_lr, bits_lr=config.bits_lr, range_decay=config.range_decay,
        )  # fmt: skip
    else:
        groups = weight_groups(model, config.lr, config.weight_decay)
    for group in groups:
        group |= _momentum(config, group["name"])
    own = QUANTIZER_GROUPS if config.quantizer_optimizer == "adam" else ()
    apart = [group for group in groups if group["name"] in own]
    found: list[Optimizer] = [_build(config, [group for group in groups if group["name"] not in own])]
    if apart:
        found.append(torch.optim.Adam(apart, fused=_fused(apart)))
    return found


def apply_(optimizers: Sequence[Optimizer], skip: Tensor | None = None) -> None:
    """Apply the gradients and clear them.

    Args:
        optimizers: of :func:`make_optimizers`.
        skip: 1.0 to change nothing, float32, no dimensions, on the device; for fused optimizers only.
    """
    for optimizer in optimizers:
        if skip is not None:
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells them
        optimizer.step()
        optimizer.zero_grad()


def load_states_(optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Load saved states of the same optimizers, whichever device they were saved on, sharded or whole.

    Args:
        optimizers: of :func:`make_optimizers`.
        states: their state dicts.
    """
    for optimizer, state in zip(optimizers, states, strict=True):
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        # the kernel is this device's, and torch puts step counts where it wants them
        groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
        optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, entries in optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[name] = like(value, parameter)


def _momentum(config: OptimizerConfig, group: str) -> dict[str, Any]:
    """Settings of a group with a momentum of its own, for each kind of optimizer."""
    momentum = {"ranges": config.range_momentum, "bits": config.bits_momentum}.get(group)
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
    """Return True for a fused optimizer, which can skip a step on the device; None leaves the choice to torch."""
    return True if all(p.device.type in FUSED for group in groups for p in group["params"]) else None


# ---------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Curve:
    """Factor on a learning rate as a function of time in epochs.

    ``warmup_start + (1 - warmup_start) t / warmup`` until ``warmup``, then
    ``final + (1 - final) (1 + cos(pi (t - warmup) / (epochs - warmup))) / 2``.

    Paper: the release's schedule, ``docs/internals/paper-map.md`` section on the schedule.

    Attributes:
        epochs: length of the whole curve in epochs, > 0.
        warmup: length of the warm-up in epochs, >= 0.
        warmup_start: factor at time 0, in (0, 1].
        final: factor at the end of the cosine, in [0, 1].
    """

    epochs: float
    warmup: float = 0.0
    warmup_start: float = 0.1
    final: float = 0.0

    def factor(self, time: float) -> float:
        """Factor at a time in epochs.

        Example:
            >>> recipe = Curve(epochs=43, warmup=3, final=0.001)
            >>> [round(recipe.factor(epoch), 4) for epoch in (0, 1, 3, 40, 42)]
            [0.1, 0.4, 1.0, 0.0148, 0.0025]
        """
        if time < self.warmup:
            return self.warmup_start + (1.0 - self.warmup_start) * time / self.warmup
        progress = min(1.0, (time - self.warmup) / max(self.epochs - self.warmup, 1e-9))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_of(config: TrainConfig, stages: Sequence[str], steps: int) -> Callable[[int], float]:
    """Factor on the config's learning rates by the number of optimizer steps, for ``LambdaLR`` and the session.

    Args:
        config: the run's config.
        stages: ``["float"]``, or ``["search", "finetune"]`` for a session.
        steps: optimizer steps of an epoch.

    Returns:
        The factor. With ``schedule: spanning`` search and fine-tuning share one curve; otherwise each stage has its
        own, scaled to its own peak, and fine-tuning does without a warm-up.
    """
    settings = config.optimizer
    parts = [getattr(config.stages, name) for name in stages]
    if settings.schedule == "spanning" and len(stages) > 1:
        lengths, warmups = [sum(part.epochs for part in parts)] * len(parts), [settings.warmup_epochs] * len(parts)
    else:
        lengths = [part.epochs for part in parts]
        warmups = [0.0 if name == "finetune" else settings.warmup_epochs for name in stages]
    curves = [
        Curve(length, warmup, settings.warmup_start, settings.final)
        for length, warmup in zip(lengths, warmups, strict=True)
    ]
    peaks = [(part.lr or settings.lr) / settings.lr for part in parts]
    first = parts[0].epochs

    def factor(step: int) -> float:
        epoch, within = divmod(step, steps)
        place = int(len(parts) > 1 and epoch >= first)
        begun = first if place and settings.schedule != "spanning" else 0
        time = epoch - begun + (0.0 if settings.step == "epoch" else within / steps)
        return peaks[place] * curves[place].factor(time)

    return factor
