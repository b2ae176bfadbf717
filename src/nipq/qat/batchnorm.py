"""Batch-norm statistics of the quantized network, measured anew, with a way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.config import Phase
from nipq.distributed import check_same_, inner
from nipq.distributed.sync_batchnorm import synced
from nipq.errors import ConfigError, OrderError
from nipq.prepare.batches import call_model, in_step, to_device
from nipq.prepare.layer_table import quantizers, set_phase_

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class BatchNormShift:
    """How far one batch norm's statistics moved.

    Attributes:
        name: full name in the model.
        mean: root mean square over channels of the change of the mean, in standard deviations before.
        std: geometric mean over channels of the standard deviation after, divided by the one before.
    """

    name: str
    mean: float
    std: float


class BatchNormUpdate:
    """What ``reestimate_bn_`` changed, and the way back.

    Attributes:
        shifts: one entry for each batch norm.
        batches: how many batches were read.
    """

    def __init__(self, before: dict[str, tuple[_BatchNorm, dict[str, Tensor]]], batches: int) -> None:
        self._before = before
        self.batches = batches
        self.shifts = tuple(_shift(name, module, values) for name, (module, values) in before.items())

    @torch.no_grad()
    def undo(self) -> None:
        """Put the statistics back as they were."""
        for module, values in self._before.values():
            _put_back(module, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"batches": self.batches, "shifts": [asdict(shift) for shift in self.shifts]}

    def __str__(self) -> str:
        """One line for each batch norm."""
        lines = [f"{shift.name}: mean moved {shift.mean:.3g} std, std x {shift.std:.4g}" for shift in self.shifts]
        return "\n".join([f"{len(lines)} batch norms from {self.batches} batches", *lines])


class _Pooled:
    """Mean and variance of all values seen, joined exactly: the mean of means, and the law of total variance."""

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        self.count = 0
        self.ranks = 1.0  # samples of all ranks for each of this one
        self.mean = torch.zeros_like(module.running_mean, dtype=torch.float64)  # type: ignore[arg-type]  # it has statistics
        self.squares = torch.zeros_like(self.mean)

    def add(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        """Join one batch, whose statistics the module just stored (its momentum is 1)."""
        count = round(args[0].numel() // args[0].shape[1] * self.ranks)
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert var is not None
        delta = mean.double() - self.mean
        total = self.count + count
        self.squares += var.double() * (count - 1) + delta**2 * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total


@torch.no_grad()
def reestimate_bn_(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> BatchNormUpdate:
    """Replace running means and variances by those of the quantized network over some batches.

    Every quantizer evaluates its true quantizer, dropout is off, and only batch norms are in training mode, so each one
    sees what the ones before it make of the batch. The batches are pooled exactly: the mean over all values, and their
    unbiased variance, within and between batches. Modes and phases are restored. With several ranks a batch is what all
    of them give at once, and the rank with the fewest batches says how many are read.

    Paper: the batch-norm update, Q15 and Q20 in docs/internals/paper-map.md.

    Args:
        model: a prepared model with batch norms.
        loader: batches, see :func:`nipq.prepare.batches.inputs_of`; augmented as in training, if training was.
        batches: how many batches to read; all if left out.

    Returns:
        A handle with the shift of each layer and ``undo()``.

    Raises:
        OrderError: if the model is not prepared.
        ConfigError: if the model has no batch norm with running statistics, or the loader is empty.
        DistributedError: if ranks hold different models, or one of them failed or is gone.
    """
    owners = quantizers(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: expected a batch norm with running statistics, found none. Leave this call out."
        )
    check_same_(model, "reestimate_bn_")
    before = {name: (module, _values(module)) for name, module in found.items()}
    momenta = {module: module.momentum for module in found.values()}
    modes = {module: module.training for module in model.modules()}
    phases = {quantizer: quantizer.phase for quantizer in owners}
    pooled = [_Pooled(module) for module in found.values()]
    set_phase_(model, Phase.ROUND)  # leaves phase int, in which batch norms are folded away
    model.eval()
    handles = []
    read = 0
    try:
        for statistics in pooled:
            statistics.module.train()
            statistics.module.momentum = 1.0
            handles.append(statistics.module.register_forward_hook(statistics.add))
        device = next(model.parameters()).device
        with synced(model):
            for inputs, ranks in in_step(islice(loader, batches), "reestimate_bn_"):
                for statistics in pooled:
                    statistics.ranks = ranks
                call_model(inner(model), to_device(inputs, device))
                read += 1
        if read == 0:
            raise ConfigError("reestimate_bn_: expected at least one batch, found an empty loader.")
        for statistics in pooled:
            _store(statistics, read)
    except BaseException:
        for norm, values in before.values():
            _put_back(norm, values)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
        if Phase.INT in phases.values():
            set_phase_(model, Phase.INT)
        else:
            for quantizer, phase in phases.items():
                quantizer.phase = phase
    return BatchNormUpdate(before, read)


def _store(statistics: _Pooled, batches: int) -> None:
    """Write pooled statistics into their batch norm."""
    module = statistics.module
    if statistics.count == 0:
        raise OrderError(
            "reestimate_bn_: expected the batches to reach every batch norm, found one that none did. "
            "Give batches that use the whole model."
        )
    values = {"running_mean": statistics.mean, "running_var": statistics.squares / (statistics.count - 1)}
    for name, value in values.items():
        getattr(module, name).copy_(value)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(batches)


def _values(module: _BatchNorm) -> dict[str, Tensor]:
    buffers = {name: getattr(module, name) for name in _BUFFERS}
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


def _put_back(module: _BatchNorm, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(value)


def _shift(name: str, module: _BatchNorm, before: dict[str, Tensor]) -> BatchNormShift:
    assert module.running_mean is not None
    assert module.running_var is not None
    old, new = before["running_var"].double() + module.eps, module.running_var.double() + module.eps
    moved = (module.running_mean.double() - before["running_mean"].double()) / old.sqrt()
    return BatchNormShift(name, float(moved.square().mean().sqrt()), float((0.5 * (new / old).log()).mean().exp()))
