"""Wrappers that trainers put around a model: looked through, and refused when they came too early."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from nipq.distributed.sharding import check_averaged
from nipq.errors import DistributedError, OrderError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several processes and for compilation."""
    return _layers(model)[-1]


def waits_for_all(model: nn.Module) -> bool:
    """Whether a wrapper may wait for a gradient of every parameter that it was built with.

    ``DistributedDataParallel`` does. With ``find_unused_parameters=True`` it looks for unused ones in what ``forward``
    returns, and refuses a gradient that one of them gets from elsewhere.
    """
    return not any(
        isinstance(layer, DistributedDataParallel) and layer.find_unused_parameters for layer in _layers(model)
    )


def check_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper that would not average what is learned: built before the model was prepared, or of another kind.

    Args:
        model: a prepared model, wrapped or not.

    Raises:
        OrderError: naming parameters that ``DistributedDataParallel`` would not average.
        DistributedError: for the first generation of FSDP, or naming a quantizer that sharding left to its rank.
    """
    bare = unwrapped(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise DistributedError(
            f"{type(bare).__name__}: expected FSDP2 (fully_shard), found FullyShardedDataParallel, which flattens "
            "parameters and shards boundaries and bit-widths with them. Use nipq.distributed.sharding.shard_ on the bare model."
        )
    check_averaged(bare)
    for layer in _layers(model):
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


def _layers(model: nn.Module) -> list[nn.Module]:
    """A model's wrappers from the outside, and the model itself."""
    found = [model]
    while True:
        last = found[-1]
        inner = last.module if isinstance(last, DistributedDataParallel) else getattr(last, "_orig_mod", last)
        if inner is last:
            return found
        found.append(inner)
