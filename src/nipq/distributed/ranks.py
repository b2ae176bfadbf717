"""Who is there, what each has to say, and errors that reach every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from nipq.errors import DistributedError, NipqError

T = TypeVar("T")

#: Seconds that :func:`barrier` waits for the slowest rank, where the backend can tell.
PATIENCE = 1800.0


def is_distributed() -> bool:
    """Whether there is a process group with more than one rank."""
    return world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialised() else 1


def inner(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, whose forward sends no messages; any other model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def rank_seed(seed: int) -> int:
    """A seed for this rank's randomness, such as its noise.

    Args:
        seed: of the run, the same on every rank.

    Returns:
        ``seed`` itself on rank 0, so that one process draws what it drew without a group; a number in [0, 2^63) that
        depends on both on the others.

    Example:
        >>> rank_seed(7)
        7
    """
    own = rank()
    if own == 0:
        return seed
    digest = hashlib.blake2b(repr(("rank", seed, own)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def gather_objects(value: T) -> list[T]:
    """What every rank has to say, in the order of ranks.

    Args:
        value: small; it is pickled.
    """
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    with all_present("gathering from all ranks"):
        dist.all_gather_object(found, value)
    return found


def from_rank_zero(decide: Callable[[], T]) -> T:
    """Let rank 0 decide, and tell the others what came out, be it an error.

    Args:
        decide: called on rank 0 only; no collective call inside.

    Returns:
        Its result on every rank (pickled on the way).

    Raises:
        NipqError: on every rank, if ``decide`` raised it on rank 0.
        DistributedError: on the other ranks, if it raised anything else there.
    """
    if not is_distributed():
        return decide()
    message: list[Any] = [None]
    failed: BaseException | None = None
    if rank() == 0:
        try:
            message = [("result", decide())]
        except NipqError as error:
            message, failed = [("error", error)], error
        except BaseException as error:
            message, failed = [("failed", repr(error))], error
    with all_present("hearing from rank 0"):
        dist.broadcast_object_list(message, src=0)
    if failed is not None:
        raise failed
    kind, content = message[0]
    if kind == "error":
        raise content
    if kind == "failed":
        raise DistributedError(f"expected a decision of rank 0, found that it failed: {content}. Look at its output.")
    return content  # type: ignore[no-any-return]  # what rank 0 returned, of its type


@contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Let an error on one rank become an error on every rank, so that none waits for another that is gone.

    Args:
        what: what the ranks are doing, for the message. The body may hold no collective call.

    Raises:
        DistributedError: on ranks where the body went well, if it failed on another.
    """
    if not is_distributed():
        yield
        return
    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = error
    reasons = gather_objects(None if failed is None else (str(failed).splitlines() or [repr(failed)])[0])
    if failed is not None:
        raise failed
    first = next((place for place, reason in enumerate(reasons) if reason is not None), None)
    if first is not None:
        raise DistributedError(
            f"{what}: expected every rank to succeed, found that rank {first} did not: {reasons[first]}"
        )


def barrier(what: str, seconds: float = PATIENCE) -> None:
    """Wait until every rank is here.

    Args:
        what: what the ranks wait for, for the message.
        seconds: how long; backends other than gloo wait as long as their process group was told.

    Raises:
        DistributedError: if a rank does not come.
    """
    if not is_distributed():
        return
    with all_present(what):
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(seconds=seconds))
        else:
            dist.barrier()


@contextmanager
def all_present(what: str) -> Iterator[None]:
    """Turn what a backend says about a missing rank into an error that says what to do.

    Args:
        what: what the ranks do together, for the message.

    Raises:
        DistributedError: for every ``RuntimeError`` inside.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"{what}: expected all {world_size()} ranks to take part, found on rank {rank()} that one did not "
            f"({reason}). It has ended or does something else: look for the first error in the other ranks' output."
        ) from error


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
