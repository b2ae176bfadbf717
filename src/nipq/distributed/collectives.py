"""Rank and world size, collectives over objects and tensors, error handling, and consistency checks across ranks.

Everything works on torch's default process group, and does nothing, at no cost, where there is none.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nipq.errors import DistributedError, NipqError, first_line
from nipq.functional.clipping import even_stride
from nipq.functional.counter_rng import seed_of

T = TypeVar("T")

#: Seconds that :func:`barrier` waits for the slowest rank, where the backend can tell.
PATIENCE = 1800.0
#: Where wrappers around a whole model hold it, by name of their class, so that none has to be imported.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile's
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
}
#: Wrappers that spread parameters over processes, likewise.
SHARDING_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def is_distributed() -> bool:
    """Return whether there is a process group with more than one rank."""
    return world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialised() else 1


def layers_of_wrapping(model: nn.Module) -> list[nn.Module]:
    """A model's wrappers from the outside, and the model itself, last.

    Args:
        model: a model, or one inside any of ``WRAPPERS``, or inside several.

    Returns:
        One module or more.
    """
    found = [model]
    while (inside := wrapped_in(found[-1])) is not None:
        found.append(inside)
    return found


def inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around it; any other model itself.

    Its forward sends no messages and is not compiled, and its names have no prefix.
    """
    return layers_of_wrapping(model)[-1]


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; None where the module is no wrapper.

    Args:
        module: any module.
    """
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return next((module._modules.get(part) for kind, part in WRAPPERS.items() if kind in kinds), None)


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
    return seed_of("rank", seed, own)


def gather_objects(value: T) -> list[T]:
    """Gather one object from every rank, in the order of ranks.

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
    """Turn a backend's error about a missing rank into one that says what to do.

    Args:
        what: what the ranks do together, for the message.

    Raises:
        DistributedError: for every ``RuntimeError`` inside.
    """
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"{what}: expected all {world_size()} ranks to take part, found on rank {rank()} that one did not "
            f"({first_line(error)}). It has ended or does something else: look for the first error in the other ranks' "
            "output."
        ) from error


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which a rank may hold a part only."""
    return hasattr(tensor, "full_tensor")  # told by its method: importing the class takes longer than importing nipq


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor's


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor's


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor sharded as another one is; itself where that is not sharded, or it is already.

    Args:
        tensor: the same on every rank.
        other: of the same shape.
    """
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    tensors = importlib.import_module("torch.distributed.tensor")  # here alone, for it takes long
    sharded: Tensor = tensors.distribute_tensor(tensor, other.device_mesh, other.placements)  # type: ignore[attr-defined]  # a DTensor's
    return sharded


def reduce_sum_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, with one message for each type and device.

    Args:
        tensors: the same shapes and types on every rank.
    """
    _reduce_(tensors, 1)


def reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, with one message for each type and device.

    Args:
        tensors: floating; the same shapes and types on every rank.
    """
    _reduce_(tensors, world_size())


def reduce_min_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the least over ranks, element by element, with one message for each type and device.

    Args:
        tensors: the same shapes and types on every rank.
    """
    _joined_(tensors, lambda flat: dist.all_reduce(flat, dist.ReduceOp.MIN))


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0, with one message for each type and device.

    Args:
        tensors: the same shapes and types on every rank.
    """

    def send(flat: Tensor) -> None:
        if rank():
            flat.zero_()  # plus zeros, one rank's numbers stay (-0 becomes 0); a message like a reduction's
        dist.all_reduce(flat)

    _joined_(tensors, send)


def gather_samples(sample: Tensor, cap: int) -> Tensor:
    """The samples of all ranks, rank by rank.

    Args:
        sample: one axis; ranks may have different lengths, 0 included.
        cap: most elements to return; of more, an evenly spaced part is kept.

    Returns:
        The same tensor on every rank; ``sample`` itself when there is one.
    """
    found = sample
    if is_distributed():
        with all_present("gathering samples"):
            own = _sendable(sample)
            counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world_size())]
            dist.all_gather(counts, torch.tensor([own.numel()], device=own.device))
            lengths = [int(count) for count in counts]
            padded = own.new_zeros(max(lengths))
            padded[: own.numel()] = own
            parts = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(parts, padded)
            found = torch.cat([share[:length] for share, length in zip(parts, lengths, strict=True)]).to(sample.device)
    return found[:: even_stride(found.numel(), cap)]


def _sendable(tensor: Tensor) -> Tensor:
    """On a device that the group's backend can send from."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return tensor.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))))
    return tensor.contiguous()


def _reduce_(tensors: Iterable[Tensor], divisor: int) -> None:
    def send(flat: Tensor) -> None:
        dist.all_reduce(flat)
        if divisor > 1:
            flat.div_(divisor)

    _joined_(tensors, send)


@torch.no_grad()
def _joined_(tensors: Iterable[Tensor], send: Callable[[Tensor], object]) -> None:
    """Send tensors of one type and device as one, and write back what came of it."""
    if not is_distributed():
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in groups.values():
        flat = _sendable(torch.cat([member.reshape(-1) for member in members]))
        with all_present("reducing over ranks"):
            send(flat)
        parts = torch.split(flat, [member.numel() for member in members])
        for member, share in zip(members, parts, strict=True):
            member.copy_(share.reshape(member.shape))


#: Elements whose checksum is computed at once.
CHUNK = 2**20
#: Buffers that ranks hold in common; others, such as running statistics, follow each rank's own batches.
COMMON_BUFFERS = ("bits_frozen", "_extra_state")
#: Few numbers that FSDP has to leave alone, see :mod:`nipq.distributed.fsdp`.
QUANTIZER_PARAMETERS = ("alpha_raw", "bit_raw")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_(model: nn.Module, what: str) -> None:
    """Refuse ranks with different models: parameters, bit-widths and grids are compared, running statistics are not.

    Args:
        model: any model; of sharded parameters shape and type are compared.
        what: who asks, for the message.

    Raises:
        DistributedError: on every rank, naming the first tensor that differs, or a quantizer's that is sharded.
    """
    if not is_distributed():
        return
    for name, parameter in model.named_parameters():
        if name.endswith(QUANTIZER_PARAMETERS) and is_sharded(parameter):
            raise DistributedError(
                f"{what}: expected every rank to hold clipping ranges and bit-widths whole, found {name} sharded. "
                "Shard with nipq.distributed.fsdp.shard_; or give fully_shard "
                "ignored_params=set(quantizer_parameters(model)) and call "
                "nipq.distributed.fsdp.average_gradients_(model) after it."
            )
    ranks = gather_objects(_fingerprint(model))
    for other, found in enumerate(ranks[1:], start=1):
        for ours, theirs in zip_longest(ranks[0], found):
            if ours != theirs:
                raise DistributedError(_difference(what, ours, theirs, other))


def _fingerprint(model: nn.Module) -> list[tuple[str, str, int]]:
    """Name, shape with type, and checksum of everything that ranks hold in common."""
    named: dict[str, Any] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = model.state_dict().items()
    named |= {name: value for name, value in state if name.endswith(COMMON_BUFFERS) and isinstance(value, Tensor)}
    sums = [torch.zeros((), dtype=torch.int64) if is_sharded(t) else checksum(t) for t in named.values()]
    values = torch.stack([value.cpu() for value in sums]).tolist() if sums else []
    return [(name, _form(tensor), value) for (name, tensor), value in zip(named.items(), values, strict=True)]


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def checksum(tensor: Tensor) -> Tensor:
    """sum_i bits_i (2 i + 1) modulo 2^64, of the elements' bit patterns as whole numbers.

    Args:
        tensor: any type whose elements have 1, 2, 4 or 8 bytes.

    Returns:
        int64, no dimensions, on the tensor's device: a change of one element, or of two elements' order, changes it.
    """
    words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK].to(torch.int64)
        odd = torch.arange(start, start + chunk.numel(), device=tensor.device).mul_(2).add_(1)
        total += (chunk * odd).sum()
    return total


def _difference(what: str, ours: tuple[str, str, int] | None, theirs: tuple[str, str, int] | None, other: int) -> str:
    """The message for two ranks whose models differ."""
    advice = "Build it from the same seed or checkpoint on every rank, or wrap it in DistributedDataParallel before."
    if ours is None or theirs is None or ours[0] != theirs[0]:
        names: Sequence[str] = ["nothing" if entry is None else entry[0] for entry in (ours, theirs)]
        found = f"{names[0]} on rank 0 where rank {other} has {names[1]}"
    elif ours[1] != theirs[1]:
        found = f"that {ours[0]} is {ours[1]} on rank 0 and {theirs[1]} on rank {other}"
    else:
        found = f"that the numbers in {ours[0]} differ between rank 0 and rank {other}"
    return f"{what}: expected the same model on every rank, found {found}. {advice}"
