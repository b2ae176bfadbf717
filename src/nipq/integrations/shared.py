"""Shared helpers of the integrations: supported versions, a seed for each rank, one callback per trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nipq.distributed import rank, rank_seed
from nipq.errors import MissingDependencyError, OrderError, require
from nipq.qat.session import QATSession


def supported(module: str, *, least: tuple[int, int], extra: str) -> ModuleType:
    """Import a trainer's library, or say what is missing.

    Args:
        module: dotted name, such as ``"pytorch_lightning"``.
        least: first supported version, major and minor.
        extra: the extra of this package that installs it.

    Returns:
        The module.

    Raises:
        MissingDependencyError: if it is missing or older.
    """
    found = require(module, extra=extra, purpose=f"nipq.integrations.{module.split('.')[0].removeprefix('pytorch_')}")
    version = str(found.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        raise MissingDependencyError(
            f"expected {module} {least[0]}.{least[1]} or newer, found {version}. "
            f'Install it with: pip install -U "nipq[{extra}]"'
        )
    return found


def check_alone(callbacks: Iterable[object], kind: type) -> None:
    """Refuse a second session in one trainer: each would freeze bits, and both would add a penalty.

    Args:
        callbacks: those of the trainer.
        kind: the class of ours.

    Raises:
        OrderError: if more than one is of that class.
    """
    found = sum(isinstance(callback, kind) for callback in callbacks)
    if found > 1:
        raise OrderError(f"trainer: expected one {kind.__name__}, found {found}. Remove the others.")


def spread_seeds(steps: int = 0) -> None:
    """Give every rank but the first a stream of random numbers of its own: trainers seed all ranks alike.

    With equal noise on all ranks, more ranks would not make its average any smaller.

    Args:
        steps: made before a run was resumed, so that it does not draw its first numbers again.
    """
    if rank():
        torch.manual_seed(rank_seed(torch.initial_seed() + steps))


def gradient_of(penalty: Tensor) -> Tensor:
    """Zero with the gradient of the penalty: the loss that a trainer logs stays the loss of the task."""
    return penalty - penalty.detach()


def leave_bits_unclipped_(accelerator: Any, session: Callable[[], QATSession | None]) -> None:  # noqa: ANN401  (untyped)
    """Let an accelerator's ``clip_grad_norm_`` pass over bits, see :func:`nipq.qat.optim.without_bits`.

    Under FSDP it stays as it is, as it looks there for the very list of the model's parameters.

    Args:
        accelerator: changed in place.
        session: gives the session of the moment.
    """
    inner = accelerator.clip_grad_norm_
    if getattr(accelerator.distributed_type, "name", "") == "FSDP":
        return

    @wraps(inner)
    def clip(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        present = session()
        bits = set() if present is None else {id(parameter) for parameter in present.learned_bits}
        return inner([parameter for parameter in given if id(parameter) not in bits], *args, **kwargs)

    accelerator.clip_grad_norm_ = clip
