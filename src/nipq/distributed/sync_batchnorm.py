"""Batch norms whose statistics are those of all ranks' batches together, on any backend.

torch's ``SyncBatchNorm`` is for GPUs, and is another class, which what is folded into layers would have to know. Here a
module keeps its class and gets another ``forward`` for a while. With the ranks' batches as equal slices of one large
batch it gives what that batch would get in one process, up to the order of sums.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.distributed import all_present, is_distributed


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; its gradients are summed over ranks as well."""

    @staticmethod
    def forward(_ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_ctx: FunctionCtx, *grads: Any) -> Tensor:  # noqa: ANN401
        return _summed(grads[0])


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with all_present("synchronising a batch norm"):
        dist.all_reduce(total)
    return total


def sync_(model: nn.Module) -> None:
    """Let every batch norm take its statistics from all ranks while it trains; without ranks nothing changes.

    Args:
        model: any model.
    """
    if is_distributed():
        for module in _batchnorms(model):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]  # as for phase "int"


def unsync_(model: nn.Module) -> None:
    """Undo :func:`sync_`."""
    for module in _batchnorms(model):
        if _is_synced(module):
            del module.__dict__["forward"]


@contextmanager
def synced(model: nn.Module) -> Iterator[None]:
    """Context in which :func:`sync_` holds; it is undone at the end.

    Args:
        model: any model; batch norms that were synchronised before stay so.
    """
    was = any(map(_is_synced, _batchnorms(model)))
    sync_(model)
    try:
        yield
    finally:
        if not was:
            unsync_(model)


def _batchnorms(model: nn.Module) -> Iterable[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


def _is_synced(module: _BatchNorm) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def _forward(module: _BatchNorm, x: Tensor) -> Tensor:
    """The forward of a batch norm; in evaluation mode its own."""
    if not module.training:
        unsynced: Tensor = type(module).forward(module, x)
        return unsynced
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    sums = _SumOverRanks.apply(torch.cat([wide.sum(axes), wide.new_tensor([x.numel() / x.shape[1]])]))
    count = sums[-1]
    mean = sums[:-1] / count
    centred = wide - mean.reshape(shape)
    var = _SumOverRanks.apply(centred.square().sum(axes)) / count  # a second message, as E x^2 - (E x)^2 cancels
    _follow(module, mean.detach(), var.detach() * (count / (count - 1)))
    y = centred * (var + module.eps).rsqrt().reshape(shape)
    if module.affine:
        y = torch.addcmul(module.bias.reshape(shape), y, module.weight.reshape(shape))
    result: Tensor = y.to(x.dtype)
    return result


@torch.no_grad()
def _follow(module: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics, as torch's own batch norm does."""
    if module.running_mean is None or module.running_var is None:
        return
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    share = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
    module.running_mean.lerp_(mean.to(module.running_mean), share)
    module.running_var.lerp_(var.to(module.running_var), share)
