"""Several processes in one run, through Accelerate: their group, the device and data of each, and the joined model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from nipq.distributed import is_distributed, rank, world_size
from nipq.distributed.fsdp import shard_
from nipq.distributed.sync_batchnorm import sync_, unsync_
from nipq.errors import ConfigError, DistributedError, NipqError, first_line, require
from nipq.train.batches import Split

if TYPE_CHECKING:
    from nipq.train.config import ParallelConfig, TrainConfig

#: Engines that ``accelerate launch`` may be told to use, and that hold parameters in a form of their own.
ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
#: Variables that launchers set for each process.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Return whether a launcher started several processes."""
    return all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Return whether this process is the first, before, in and after the group."""
    return rank() == 0 and (not is_launched() or os.environ["RANK"] == "0")


@contextmanager
def accelerated(config: TrainConfig) -> Iterator[Any]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, for one run.

    A group that exists already is used and stays.

    Args:
        config: names the device, the precision, and how long to wait for others.

    Yields:
        The ``accelerate.Accelerator``.

    Raises:
        ConfigError: if CUDA is asked for and not there, or there are fewer GPUs than processes.
        DistributedError: if the others do not come in time.
        MissingDependencyError: without Accelerate.
    """
    existed = dist.is_available() and dist.is_initialized()
    yield make_accelerator(config)
    if is_distributed() and not existed:
        dist.destroy_process_group()  # after an error the process ends, and waiting for others could take for ever


def make_accelerator(config: TrainConfig) -> Any:  # noqa: ANN401 - an optional package's class
    """Accelerate's view of this process; see :func:`accelerated`."""
    library = require("accelerate", extra="train", purpose="nipq train")
    settings = {
        "cpu": config.device == "cpu" or not _has_cuda(config.device),
        "mixed_precision": config.amp or "no",
        "kwargs_handlers": [library.InitProcessGroupKwargs(timeout=timedelta(minutes=config.parallel.timeout))],
    }
    # The state is one for all accelerators of a process, and of a former run with other settings.
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    with _known_group():
        try:
            return library.Accelerator(**settings)
        except (RuntimeError, ValueError) as error:
            if not is_launched():
                raise
            raise DistributedError(
                f"expected {os.environ['WORLD_SIZE']} processes to meet at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, found that they did not ({first_line(error)}); start them with "
                "torchrun or accelerate launch, and look at the output of each"
            ) from error


def _has_cuda(name: str) -> bool:
    """Return whether this process can train on a GPU; of several GPUs it takes the one that the launcher gave to it."""
    if not torch.cuda.is_available():
        if name == "cuda":
            raise ConfigError("expected a CUDA device, found none; set device to auto or cpu")
        return False
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= count:
        raise ConfigError(
            f"expected a GPU for each process of this machine, found {count} GPUs and a process number {own}; "
            f"start {count} processes a machine"
        )
    return True


@contextmanager
def _known_group() -> Iterator[None]:
    """Tell Accelerate, which looks at the environment only, of a group that was made elsewhere."""
    if not is_distributed() or "LOCAL_RANK" in os.environ:
        yield
        return
    before = dict(os.environ)
    own, count = str(rank()), str(world_size())
    os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def share(split: Split, batch_size: int) -> Split:
    """Training split of this process: its slice of every batch, or the split itself when it is alone.

    Args:
        split: the training split.
        batch_size: of the config; the split's own counts where it has one.

    Returns:
        The share.

    Raises:
        ConfigError: if there are fewer samples than processes, or batches cannot be divided.
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


def join_(model: nn.Module, config: ParallelConfig, accelerator: Any) -> nn.Module:  # noqa: ANN401
    """Make a model train as one over all processes; itself when there is but one.

    FSDP2 does not go through Accelerate's plugin: that one computes in the parameters' own bfloat16 under mixed
    precision, which would swallow the steps of clipping ranges and bit-widths, and needs its optimizer at the same
    time.

    Args:
        model: the model as it is now; with ``strategy: fsdp`` its parameters are sharded in place.
        config: the ``parallel`` section.
        accelerator: of :func:`make_accelerator`.

    Returns:
        The module to call in training steps.

    Raises:
        ConfigError: if the processes were launched with another engine.
    """
    if not is_distributed():
        return model
    if config.sync_batchnorm:
        sync_(model)
    if config.strategy == "fsdp":
        return shard_(model)
    engine = accelerator.distributed_type.name
    if engine in ENGINES:
        raise ConfigError(
            f"expected processes that share a model by parallel.strategy, found that they were launched with {engine}; "
            "launch them without it, and set parallel.strategy to ddp or fsdp"
        )
    network: nn.Module = accelerator.prepare_model(model)
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # autocast is the loop's: evaluation is in float32
    return network


def part_(model: nn.Module, accelerator: Any) -> None:  # noqa: ANN401
    """Undo :func:`join_`, but for sharding."""
    unsync_(model)
    accelerator.free_memory()


def explained(error: RuntimeError, model: nn.Module) -> NipqError | None:
    """Explain an error of a training step that comes from several processes; ``None`` for any other.

    Args:
        error: as torch raised it.
        model: the model, to name parameters.
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
        f"not ({first_line(error)}); look for the first error in the other ranks' output, then continue from the "
        "last checkpoint with --resume"
    )
