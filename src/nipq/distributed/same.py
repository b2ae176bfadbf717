"""Whether all ranks hold the same model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed.numbers import is_sharded
from nipq.distributed.ranks import gather_objects, is_distributed
from nipq.errors import DistributedError

#: Elements whose checksum is computed at once.
CHUNK = 2**20
#: Buffers that ranks hold in common; others, such as running statistics, follow each rank's own batches.
COMMON_BUFFERS = ("bits_frozen", "_extra_state")
#: Few numbers that FSDP has to leave alone, see :mod:`nipq.distributed.sharding`.
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
                f"{what}: expected every rank to hold boundaries and bit-widths whole, found {name} sharded. "
                "Shard with nipq.distributed.sharding.shard_; or give fully_shard ignored_params=set(quantizer_parameters(model)) "
                "and call nipq.distributed.sharding.average_gradients_(model) after it."
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
