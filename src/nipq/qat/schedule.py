"""Learning-rate schedules of a QAT session, as factors on the optimizer's own learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nipq.errors import ConfigError, OrderError

#: Factor on every learning rate of the optimizer after so many of its steps.
Factor: TypeAlias = Callable[[int], float]
Schedule: TypeAlias = Literal["cosine"] | Factor | None

#: Factor that a warm-up starts with.
WARMUP_START = 0.1


def cosine(total_steps: int, warmup: float = 0.0) -> Factor:
    """Half a cosine down to zero, over search and fine-tuning together, after a linear warm-up if one is asked for.

    With p the share of ``total_steps`` that has passed and w the warm-up: ``s + (1 - s) p / w`` up to w, from then on
    ``(1 + cos(pi (p - w) / (1 - w))) / 2``, where s is :data:`WARMUP_START`.

    Args:
        total_steps: length of training in optimizer steps; what comes after has a factor of 0.
        warmup: w, from 0 to below 1.

    Returns:
        The factor as a function of the number of optimizer steps that were made.

    Example:
        >>> [round(cosine(100)(step), 3) for step in (0, 50, 100)]
        [1.0, 0.5, 0.0]
        >>> [round(cosine(100, warmup=0.05)(step), 3) for step in (0, 5, 50)]
        [0.1, 1.0, 0.541]
    """

    def factor(steps: int) -> float:
        passed = min(1.0, steps / max(1, total_steps))
        if passed < warmup:
            return WARMUP_START + (1 - WARMUP_START) * passed / warmup
        return 0.5 * (1 + math.cos(math.pi * (passed - warmup) / (1 - warmup)))

    return factor


def schedulers(schedule: Schedule, optimizers: Sequence[Optimizer], total_steps: int) -> list[LambdaLR]:
    """Attach a schedule to optimizers.

    Args:
        schedule: ``"cosine"``, a function of the number of steps, or None to leave learning rates to the caller.
        optimizers: those of the training loop.
        total_steps: length of training in optimizer steps.

    Returns:
        One scheduler for each optimizer; none without a schedule.

    Raises:
        ConfigError: if the schedule is of another kind.
        OrderError: if an optimizer has a scheduler already.
    """
    check_schedule(schedule, optimizers)
    if schedule is None:
        return []
    factor = cosine(total_steps) if schedule == "cosine" else schedule
    return [LambdaLR(optimizer, factor) for optimizer in optimizers]


def check_schedule(schedule: Schedule, optimizers: Sequence[Optimizer]) -> None:
    """Refuse what :func:`schedulers` cannot attach.

    Args:
        schedule: see there.
        optimizers: those of the training loop.

    Raises:
        ConfigError: if the schedule is of another kind.
        OrderError: if an optimizer has a scheduler already.
    """
    if schedule is None:
        return
    if schedule != "cosine" and not callable(schedule):
        raise ConfigError(
            f"QATSession: expected schedule 'cosine', a function of the number of steps, or None; found {schedule!r}."
        )
    for optimizer in optimizers:
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise OrderError(
                "QATSession: expected an optimizer without a learning-rate scheduler, found one that has one. Pass "
                "schedule=None to keep yours, or build the session with a new optimizer and no scheduler."
            )


def check_rates(schedulers: Sequence[LambdaLR]) -> None:
    """Refuse learning rates that were changed from outside, such as a scheduler that was built after the session.

    Rates that are tensors are not looked at, as that would wait for the device.

    Args:
        schedulers: what :func:`schedulers` returned.

    Raises:
        OrderError: if a learning rate is not what the schedule set.
    """
    for scheduler in schedulers:
        for group, expected in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=False):
            if not isinstance(group["lr"], Tensor) and group["lr"] != expected:
                raise OrderError(
                    f"QATSession: expected the learning rate that its schedule set, {expected:.6g}, found "
                    f"{group['lr']:.6g}. Pass schedule=None to use a scheduler of your own or to set rates by hand."
                )


def resume_(schedulers: Sequence[LambdaLR], steps: int, factor: Factor | None = None) -> None:
    """Set schedules and learning rates to where they are after a number of steps.

    Args:
        schedulers: what :func:`schedulers` returned.
        steps: optimizer steps that were made.
        factor: of the run that is continued, if another one than was attached.
    """
    for scheduler in schedulers:
        scheduler.last_epoch = steps
        if factor is not None:
            scheduler.lr_lambdas = [factor for _ in scheduler.lr_lambdas]
        bases = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, rate, own in bases:
            group["lr"] = rate * own(steps)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
