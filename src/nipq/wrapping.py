"""Wrappers that trainers put around a model: looked through, and refused when they came too early."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nipq.errors import OrderError


def check_wrapper(model: nn.Module) -> None:
    """Refuse a model that was wrapped for several processes before it was prepared.

    Args:
        model: a prepared model, wrapped or not.

    Raises:
        OrderError: naming parameters that ``DistributedDataParallel`` would not average.
    """
    known = getattr(model, "_module_parameters", None)
    if not isinstance(model, DistributedDataParallel) or known is None:
        return
    held = {id(parameter) for parameter in known}
    missing = [name for name, p in model.module.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OrderError(
            f"{type(model.module).__name__}: expected DistributedDataParallel around a prepared model, found one built "
            f"before prepare_, which would not average {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
            "Prepare first, wrap then."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several processes and for compilation."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner
