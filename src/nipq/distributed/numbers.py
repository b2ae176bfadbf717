"""Tensors over ranks: sums, means, samples, and tensors of which each rank holds a part."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nipq.distributed.ranks import all_present, is_distributed, rank, world_size
from nipq.functional.sampling import even_stride


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which a rank may hold a part only."""
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
