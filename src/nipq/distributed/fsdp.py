"""Prepared models under FSDP2 and DistributedDataParallel.

FSDP2 shards the weights; the few numbers of the quantizers stay whole on every rank. A clipping range or a bit-width is
one number: sharded, it would lie on one of the ranks, and the price of bits, the freeze and every report would have to
fetch thousands of single numbers. So quantizers' parameters are not sharded, and their gradients are averaged over
ranks by one message at the end of every backward pass.

Wrappers that trainers put around a model are looked through, and refused where they were built before ``prepare_``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from nipq.distributed import check_same_, inner, is_sharded, layers_of_wrapping, reduce_mean_
from nipq.errors import DistributedError, OrderError
from nipq.nn.quantizer import TensorQuantizer

#: Quantizers whose gradients :func:`average_gradients_` sees to.
_AVERAGED: WeakSet[TensorQuantizer] = WeakSet()


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Clipping ranges, bit-widths and offsets of a model, the ``ignored_params`` of ``fully_shard``."""
    return list(dict.fromkeys(_parameters(_owners(model))))


def shard_(model: nn.Module, blocks: Iterable[nn.Module] | None = None, **settings: Any) -> nn.Module:  # noqa: ANN401
    """``fully_shard`` a model for training, and average the gradients of its quantizers.

    Call it on a prepared and calibrated model (a float one is sharded as usual), then build the optimizer. Bits may be
    frozen afterwards; ``nipq.qat.search.Search``, ``nipq.qat.ema.WeightAverage``, ``nipq.calibrate_`` and
    ``nipq.reestimate_bn_`` work on the sharded model, ``nipq.allocate_bits_`` and ``nipq.budget.hawq.allocate_`` go
    before. Deploy from the full state dict.

    Args:
        model: the model; its parameters become ``DTensor`` in place.
        blocks: parts whose weights are gathered together; the items of its containers if left out.
        **settings: of ``torch.distributed.fsdp.fully_shard``.

    Returns:
        The same model.

    Raises:
        DistributedError: without a process group, if ranks hold different models, or quantizers were sharded before.
    """
    if not torch.distributed.is_initialized():
        raise DistributedError(
            "shard_: expected a process group, found none. Start the program with torchrun or accelerate launch and "
            "call torch.distributed.init_process_group first."
        )
    from torch.distributed.fsdp import fully_shard  # here, as it brings sympy and takes longer than torch itself

    check_same_(model, "shard_")
    # Gathered weights are given back after every forward, the root's as well: who looks at a parameter between steps
    # (weight averages, checkpoints) then sees the same tensor every time.
    given: dict[str, Any] = {
        "reshard_after_forward": True,
        "ignored_params": set(quantizer_parameters(model)),
    } | settings
    for block in _blocks(model) if blocks is None else blocks:
        fully_shard(block, **given)
    fully_shard(model, **given)
    average_gradients_(model)
    return model


def average_gradients_(model: nn.Module) -> None:
    """Average the gradients of quantizers over ranks at the end of every backward pass, in one message.

    For models that ``fully_shard`` was called on with ``ignored_params=set(quantizer_parameters(model))``. With
    accumulated gradients what was averaged before stays what it is, so the sum is the average of sums.

    Args:
        model: the sharded model.
    """
    owners = list(_owners(model))
    _AVERAGED.update(owners)
    queued: list[bool] = []

    def finish() -> None:
        queued.clear()
        learned = [parameter for parameter in _parameters(owners) if parameter.requires_grad]
        for parameter in learned:
            if parameter.grad is None:  # not reached on this rank, perhaps on another
                parameter.grad = torch.zeros_like(parameter)
        reduce_mean_([parameter.grad for parameter in learned if parameter.grad is not None])

    def queue(_parameter: Tensor) -> None:
        if not queued:
            queued.append(True)
            Variable._execution_engine.queue_callback(finish)  # as FSDP itself does

    # A backward pass that ended with an error never came to its end, and must not keep the next from being averaged.
    model.register_forward_pre_hook(lambda *_: queued.clear())
    for parameter in _parameters(owners):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(queue)  # type: ignore[no-untyped-call]  # torch gives it no type


def check_averaged(model: nn.Module) -> None:
    """Refuse sharded weights around whole quantizers whose gradients are not averaged.

    Args:
        model: a prepared model.

    Raises:
        DistributedError: naming a quantizer that each rank would train on its own.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return
    for owner in _owners(model):
        if owner not in _AVERAGED and not any(is_sharded(parameter) for parameter in owner.parameters()):
            raise DistributedError(
                f"{owner.name}: expected its gradients to be averaged over ranks, found weights that fully_shard "
                "sharded and a quantizer that it left out. Shard with nipq.distributed.fsdp.shard_, or call "
                "nipq.distributed.fsdp.average_gradients_(model) after fully_shard."
            )


def _owners(model: nn.Module) -> Iterator[TensorQuantizer]:
    return (module for module in model.modules() if isinstance(module, TensorQuantizer))


def _parameters(owners: Iterable[TensorQuantizer]) -> Iterator[nn.Parameter]:
    return (parameter for owner in owners for parameter in owner.parameters())


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model's containers that hold layers, innermost containers first."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            found += [block for block in module if any(True for _ in block.children())]
        else:
            found += _blocks(module)
    return list(dict.fromkeys(found))


def waits_for_all(model: nn.Module) -> bool:
    """Return whether a wrapper may wait for a gradient of every parameter that it was built with.

    ``DistributedDataParallel`` does. With ``find_unused_parameters=True`` it looks for unused ones in what ``forward``
    returns, and refuses a gradient that one of them gets from elsewhere.
    """
    wrappers = [layer for layer in layers_of_wrapping(model) if isinstance(layer, DistributedDataParallel)]
    return not any(wrapper.find_unused_parameters for wrapper in wrappers)


def check_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper that would not average what is learned: built before the model was prepared, or of another kind.

    Args:
        model: a prepared model, wrapped or not.

    Raises:
        OrderError: naming parameters that ``DistributedDataParallel`` would not average.
        DistributedError: for the first generation of FSDP, or naming a quantizer that sharding left to its rank.
    """
    bare = inner(model)
    # A model can only hold one if its module, which is slow to import, has been imported.
    first_generation = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, first_generation) for module in model.modules()):
        raise DistributedError(
            f"{type(bare).__name__}: expected FSDP2 (fully_shard), found FullyShardedDataParallel, which flattens "
            "parameters and shards clipping ranges and bit-widths with them. Use nipq.distributed.fsdp.shard_ on the "
            "bare model."
        )
    check_averaged(bare)
    for layer in layers_of_wrapping(model):
        known = getattr(layer, "_module_parameters", None)
        if not isinstance(layer, DistributedDataParallel) or known is None:
            continue
        held = {id(parameter) for parameter in known}
        missing = [name for name, p in bare.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise OrderError(
                f"{type(bare).__name__}: expected DistributedDataParallel around a prepared model, found one built "
                f"before prepare_, which would not average {named}. Prepare first, wrap then."
            )
