"""What all integrations share: versions that they were written for, a seed for each rank, one guest at a time."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from nipq.distributed import rank, rank_seed
from nipq.errors import MissingDependencyError, OrderError, require


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


def check_alone(guests: Iterable[object], kind: type) -> None:
    """Refuse a second course in one trainer: each would freeze bits, and both would add a penalty.

    Args:
        guests: what the trainer holds.
        kind: the class of ours.

    Raises:
        OrderError: if more than one is of that class.
    """
    found = sum(isinstance(guest, kind) for guest in guests)
    if found > 1:
        raise OrderError(f"trainer: expected one {kind.__name__}, found {found}. Remove the others.")


def spread_seeds() -> None:
    """Give every rank but the first a stream of random numbers of its own: trainers seed all ranks alike.

    With equal noise on all ranks, more ranks would not make its average any smaller.
    """
    if rank():
        torch.manual_seed(rank_seed(torch.initial_seed()))


def gradient_of(penalty: Tensor) -> Tensor:
    """Zero with the gradient of the penalty: what a trainer logs as its loss stays the loss of the task."""
    return penalty - penalty.detach()
