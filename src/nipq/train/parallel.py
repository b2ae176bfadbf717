"""Several processes in one run: the group they form, the device and the data of each, and the model that joins them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nipq.distributed import is_distributed, rank, world_size
from nipq.distributed.fsdp import shard_
from nipq.distributed.sync_batchnorm import sync_, unsync_
from nipq.errors import ConfigError, DistributedError, NipqError
from nipq.train.batches import Split

if TYPE_CHECKING:
    from nipq.train.config import ParallelConfig, TrainConfig

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell each process."""


@contextmanager
def process_group(config: TrainConfig) -> Iterator[None]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, for one run.

    Nothing happens for a single process, or where somebody has made a group before.

    Args:
        config: Says which device, and how long to wait for others.

    Raises:
        DistributedError: If the others do not come in time.
    """
    if not is_launched() or dist.is_initialized():
        yield
        return
    cuda = pick_device(config.device).type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=config.parallel.timeout)
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"expected {os.environ['WORLD_SIZE']} processes to meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}, found that they did not ({str(error).splitlines()[0]}); start them with "
            "torchrun or accelerate launch, and look at the output of each"
        ) from error
    yield
    dist.destroy_process_group()  # after an error the process ends, and waiting for others could take for ever


def is_launched() -> bool:
    """Whether a launcher started several processes."""
    return all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process speaks for all, before, in and after the group."""
    return rank() == 0 and (not is_launched() or os.environ["RANK"] == "0")


def pick_device(name: str) -> torch.device:
    """The device that a config names; of several GPUs the one that the launcher gave to this process.

    Raises:
        ConfigError: If CUDA is asked for and not there, or there are fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("expected a CUDA device, found none; set device to auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if not is_launched():
        return torch.device("cuda")
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= count:
        raise ConfigError(
            f"expected a GPU for each process of this machine, found {count} GPUs and a process number {own}; "
            f"start {count} processes a machine"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def share(split: Split, batch_size: int) -> Split:
    """What this process trains on: its slice of every batch, or the split itself when it is alone.

    Args:
        split: The training split.
        batch_size: Of the config; the split's own counts where it has one.

    Returns:
        The share.

    Raises:
        ConfigError: If there are fewer samples than processes, or batches cannot be divided.
    """
    parts = world_size()
    if parts == 1:
        return split
    size = int(getattr(split, "batch_size", batch_size))
    if size < parts:
        raise ConfigError(
            f"expected at least one training sample for each of {parts} processes, found batches of {size}; "
            "raise data.batch_size, add training data, or start fewer processes"
        )
    if size % parts:
        raise ConfigError(
            f"expected a batch size that {parts} processes can share equally, found {size}; "
            f"set data.batch_size to {size // parts * parts} or {-(-size // parts) * parts}, or change the processes"
        )
    return split.part(rank(), parts)


def join_(model: nn.Module, config: ParallelConfig) -> nn.Module:
    """Make a model train as one over all processes; itself when there is but one.

    Args:
        model: As it is in the stage that begins; with ``strategy: fsdp`` its parameters are sharded in place.
        config: The ``parallel`` section.

    Returns:
        What to call in training steps.
    """
    if not is_distributed():
        return model
    if config.sync_batchnorm:
        sync_(model)
    if config.strategy == "fsdp":
        return shard_(model)
    return DistributedDataParallel(model)


def part_(model: nn.Module) -> None:
    """Undo what :func:`join_` did to batch norms."""
    unsync_(model)


def explained(error: RuntimeError, model: nn.Module) -> NipqError | None:
    """What an error in a step means if it comes from there being several processes; ``None`` otherwise.

    Args:
        error: What torch raised.
        model: The model, to name parameters.
    """
    text = str(error)
    if not is_distributed():
        return None
    if "Expected to have finished reduction" in text:
        listed = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        unused = [names[int(place)] for place in listed[1].split()] if listed else []
        return ConfigError(
            f"expected every parameter to take part in a training step, found that {', '.join(unused[:3]) or 'some'} "
            "did not, which parallel.strategy ddp waits for; take the layers out of the model, or choose fsdp"
        )
    if not any(word in text.lower() for word in ("gloo", "nccl", "connection", "timed out")):
        return None
    return DistributedError(
        f"expected all {world_size()} processes to take part in a training step, found on rank {rank()} that one did "
        f"not ({text.splitlines()[0]}); look for the first error in the other ranks' output, then continue from the "
        "last checkpoint with --resume"
    )
