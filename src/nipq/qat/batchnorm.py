"""Batch-norm statistics of the quantized network: measured anew or moved, kept where that helps, with a way back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.budget.distance import OutputJudge, float_outputs, rounding
from nipq.distributed import check_same_, inner, reduce_sum_
from nipq.distributed.sync_batchnorm import synced
from nipq.errors import ConfigError, NonFiniteError
from nipq.prepare.batches import BatchReader, Inputs, check_rereadable, to_device
from nipq.prepare.layer_table import quantizers

#: Statistics of the batches themselves, or the present ones moved by what quantization changes on the batches.
Statistics = Literal["absolute", "relative"]

logger = logging.getLogger(__name__)

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class BatchNormShift:
    """Shift of one batch norm's statistics.

    Attributes:
        name: full name in the model.
        mean: root mean square over channels of the change of the mean, in standard deviations before.
        std: geometric mean over channels of the standard deviation after, divided by the one before.
    """

    name: str
    mean: float
    std: float


class BatchNormUpdate:
    """Changes that ``reestimate_bn_`` made, with :meth:`undo`.

    Attributes:
        shifts: one entry for each batch norm.
        batches: how many batches were read.
        unreached: names of batch norms that no batch reached, such as those of an auxiliary head; they are as before.
    """

    def __init__(
        self, before: dict[str, tuple[_BatchNorm, dict[str, Tensor]]], batches: int, unreached: Sequence[str] = ()
    ) -> None:
        self._before = before
        self._after = {name: _values(module) for name, (module, _) in before.items()}
        self.batches, self.unreached = batches, tuple(unreached)
        self.shifts = tuple(_shift(name, module, values) for name, (module, values) in before.items())

    def is_current(self) -> bool:
        """Return whether the statistics are still those that it left (reads values)."""
        return all(
            torch.equal(getattr(module, name), value)
            for norm, (module, _) in self._before.items()
            for name, value in self._after[norm].items()
        )

    @torch.no_grad()
    def undo(self) -> None:
        """Put the statistics back as they were."""
        for module, values in self._before.values():
            _put_back(module, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        shifts = [asdict(shift) for shift in self.shifts]
        return {"batches": self.batches, "shifts": shifts, "unreached": list(self.unreached)}

    def __str__(self) -> str:
        """One line for each batch norm."""
        lines = [f"{shift.name}: mean moved {shift.mean:.3g} std, std x {shift.std:.4g}" for shift in self.shifts]
        lines += [f"{name}: not reached, as before" for name in self.unreached]
        return "\n".join([f"{len(self.shifts)} batch norms from {self.batches} batches", *lines])


class _Pooled:
    """Mean and variance of all values that reach a batch norm, joined exactly over batches.

    The mean of means, and the law of total variance.
    """

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        self.count = 0
        self.ranks = 1.0  # samples of all ranks for each of this one
        self.mean = torch.zeros_like(module.running_mean, dtype=torch.float64)  # type: ignore[arg-type]  # it has statistics
        self.squares = torch.zeros_like(self.mean)

    def join(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Join the mean and the unbiased variance, of two values or more, of ``count`` values of each channel."""
        delta = mean.double() - self.mean
        total = self.count + count
        within = var.double() * (count - 1) if count > 1 else torch.zeros_like(delta)
        self.squares += within + delta**2 * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def prepare(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Let a batch of one value for each channel, which has no variance, be normalised by what was pooled before."""
        module.training = self._size(_input_of(args, kwargs)) > 1
        if not module.training and self.count > 1:
            _store(self.module, self.mean, self.var)

    def add(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], _output: Tensor) -> None:
        """Join one batch, whose statistics the module just stored (its momentum is 1)."""
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert var is not None
        x = _input_of(args, kwargs)
        size = self._size(x)
        self.join(mean if size > 1 else x.detach().reshape(-1), var, size)

    def _size(self, x: Tensor) -> int:
        """Values of each channel that all ranks have together."""
        return round(x.numel() // x.shape[1] * self.ranks)

    def reduce_(self) -> None:
        """Join what the ranks have pooled, each of its own batches."""
        count = self.mean.new_tensor(float(self.count))
        total, sums = count.clone(), self.mean * count
        reduce_sum_([total, sums])
        mean = sums / total.clamp(min=1)
        self.squares += count * (self.mean - mean) ** 2
        reduce_sum_([self.squares])
        self.mean, self.count = mean, round(float(total))

    @property
    def var(self) -> Tensor:
        """Unbiased variance of each channel."""
        return self.squares / (self.count - 1)


class _Relative:
    """Statistics of one batch norm, moved by what quantization does to them on the same batch.

    With mean m and variance v of a batch in the quantized network, and m_f, v_f in the float network, the batch norm
    evaluates with running_mean + m - m_f and running_var (v + eps) / (v_f + eps), so that the ones after it see what it
    will make of the batch.
    """

    def __init__(self, module: _BatchNorm) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        self.module = module
        self.before = module.running_mean.clone(), module.running_var.clone()
        self.float, self.quantized = _Pooled(module), _Pooled(module)
        self._floats: list[tuple[Tensor, Tensor]] = []
        self.quantizing = False

    def look(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Note a batch of the float network, or move the statistics for the same batch of the quantized one."""
        x = _input_of(args, kwargs).detach().float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, count = x.mean(axes), x.numel() // x.shape[1]
        var = x.var(axes) if count > 1 else torch.zeros_like(mean)
        if not self.quantizing:
            self._floats.append((mean, var))
            self.float.join(mean, var, count)
            return
        self.quantized.join(mean, var, count)
        self._move(mean, var, *self._floats.pop(0))

    def store(self) -> None:
        """Move the statistics by all batches of all ranks."""
        self.float.reduce_()
        self.quantized.reduce_()
        if self.float.count > 1:
            self._move(self.quantized.mean, self.quantized.var, self.float.mean, self.float.var)

    def put_back(self) -> None:
        """Give the float network its own statistics for the next batch."""
        self.quantizing = False
        self._floats.clear()
        for buffer, value in zip((self.module.running_mean, self.module.running_var), self.before, strict=True):
            assert buffer is not None
            buffer.copy_(value)

    def _move(self, mean: Tensor, var: Tensor, float_mean: Tensor, float_var: Tensor) -> None:
        assert self.module.running_mean is not None
        assert self.module.running_var is not None
        eps = self.module.eps
        self.module.running_mean.copy_(self.before[0] + (mean - float_mean))
        self.module.running_var.copy_(self.before[1] * ((var + eps) / (float_var + eps)))


@torch.no_grad()
def reestimate_bn_(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int | None = None,
    *,
    statistics: Statistics = "absolute",
    inputs: Inputs | None = None,
) -> BatchNormUpdate:
    """Adapt running means and variances to the quantized network over some batches.

    Every quantizer evaluates its true quantizer and dropout is off. ``"absolute"`` replaces the statistics by those of
    these batches: only batch norms are in training mode, so each one sees what the ones before it make of the batch,
    and the batches are pooled exactly, mean over all values, and unbiased variance, within and between batches. Use
    it with the data that the network was trained on. ``"relative"`` moves the statistics by the difference between the
    quantized and the float network on the same samples, which leaves alone how these samples differ from the training
    data: mean + m_q - m_f, and variance (v_q + eps) / (v_f + eps). Use it with few samples, or others than in training.

    Modes and phases are restored. Batch norms that no batch reaches, such as in an auxiliary head that is there in
    training only, stay as they are; the result and a warning in the log name them. With several ranks a batch is what
    all of them give at once (relative statistics are of each rank's batches, joined at the end), and the rank with the
    fewest batches says how many are read.

    Paper: the batch-norm update, Q15 and Q20 in docs/internals/paper-map.md; relative statistics are not in it.

    Args:
        model: a prepared model with batch norms.
        loader: batches; augmented as in training, if training was.
        batches: how many batches to read; all if left out.
        statistics: see above.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        A handle with the shift of each layer and ``undo()``.

    Raises:
        OrderError: if the model is not prepared.
        ConfigError: if the model has no batch norm with running statistics, or the loader is empty, or holds one value
            of each channel, or a batch is not what the model takes.
        NonFiniteError: if statistics became NaN or infinite; all are as before.
        DistributedError: if ranks hold different models, or one of them failed or is gone.
    """
    if statistics not in get_args(Statistics):
        raise ConfigError(f"reestimate_bn_: expected statistics 'absolute' or 'relative', found {statistics!r}.")
    if batches is not None and batches < 1:
        raise ConfigError(f"reestimate_bn_: expected batches of at least 1, found {batches}. Leave it out for all.")
    quantizers(model)  # raises for a model that is not prepared
    found = batchnorms(model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: expected a batch norm with running statistics, found none. Leave this call out."
        )
    check_same_(model, "reestimate_bn_")
    before = {name: (module, _values(module)) for name, module in found.items()}
    measure = _absolute if statistics == "absolute" else _relative
    reader = BatchReader(model, inputs, "reestimate_bn_")
    try:
        with rounding(model):
            read, reached = measure(model, list(found.values()), reader, loader, batches)
            _check_finite({name: norm for name, norm in found.items() if norm in reached})
    except BaseException:
        for norm, values in before.values():
            _put_back(norm, values)
        raise
    unreached = [name for name, norm in found.items() if norm not in reached]
    if unreached:
        logger.warning("batch norms that no batch reached stay as they are: %s", ", ".join(unreached))
    return BatchNormUpdate({name: before[name] for name in before if name not in unreached}, read, unreached)


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms of a model that keep running statistics, by name.

    Args:
        model: any model.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@dataclass(frozen=True)
class BatchNormChoice:
    """The batch-norm statistics that a model kept, with the distances of all that were tried.

    Attributes:
        kept: ``"none"`` (those it had), ``"relative"`` or ``"absolute"``.
        distances: of each choice, the distance of the outputs from the float network's on the held-out batches.
        update: the change, with ``undo()``; None if nothing was kept.
    """

    kept: Statistics | Literal["none"]
    distances: dict[str, float]
    update: BatchNormUpdate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"kept": self.kept, "distances": dict(self.distances)}

    def __str__(self) -> str:
        """One line."""
        found = ", ".join(f"{name} {distance:.4g}" for name, distance in self.distances.items())
        return f"batch norms: kept {self.kept}; distance from float on held-out samples: {found}"


@torch.no_grad()
def reestimate_bn_if_better_(
    model: nn.Module,
    loader: Iterable[Any],
    held_out: Iterable[Any],
    batches: int | None = None,
    *,
    candidates: Sequence[Statistics] = ("relative", "absolute"),
    reference: nn.Module | None = None,
    inputs: Inputs | None = None,
) -> BatchNormChoice:
    """Re-estimate batch norms, and keep it only where it brings the outputs nearer to the float network's.

    Each of ``candidates`` is measured from the statistics that the model has now, and judged by
    :func:`nipq.budget.distance.output_distance` on batches that it did not see. The nearest stays, or none.

    Args:
        model: a prepared model.
        loader: batches to measure statistics with, as for :func:`reestimate_bn_`.
        held_out: other batches, to judge by; read once.
        batches: how many of ``loader`` to read; all if left out.
        candidates: ways of re-estimation to try.
        reference: the float network in evaluation mode; if left out, the model in phase ``"float"`` with the statistics
            that it has now. Give it when the weights were trained since.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        What was kept, with the distances. A model without batch norms keeps ``"none"``.

    Raises:
        As :func:`reestimate_bn_`; ConfigError also if ``held_out`` is empty.
    """
    norms = batchnorms(model)
    if not norms:
        return BatchNormChoice("none", {})
    check_rereadable(loader, "reestimate_bn_if_better_")
    judge = OutputJudge(model, held_out, reference, inputs=inputs)
    distances = {"none": judge.distance()}
    kept: Statistics | Literal["none"] = "none"
    best: BatchNormUpdate | None = None
    values: dict[str, dict[str, Tensor]] = {}
    for statistics in candidates:
        update = reestimate_bn_(model, loader, batches, statistics=statistics, inputs=inputs)
        distances[statistics] = judge.distance()
        if distances[statistics] < distances[kept]:
            kept, best, values = statistics, update, {name: _values(norm) for name, norm in norms.items()}
        update.undo()
    for name, found in values.items():
        _put_back(norms[name], found)
    return BatchNormChoice(kept, distances, best)


def _absolute(
    model: nn.Module, norms: Sequence[_BatchNorm], reader: BatchReader, loader: Iterable[Any], most: int | None
) -> tuple[int, set[_BatchNorm]]:
    """Replace the statistics by those of some batches; gives back how many were read, and what they reached."""
    pooled = [_Pooled(norm) for norm in norms]
    settings = [(norm.momentum, norm.track_running_stats) for norm in norms]
    handles = [one.module.register_forward_hook(one.add, with_kwargs=True) for one in pooled]
    handles += [one.module.register_forward_pre_hook(one.prepare, with_kwargs=True) for one in pooled]
    device = next(model.parameters()).device
    read = 0
    try:
        for norm in norms:
            norm.train()
            norm.momentum, norm.track_running_stats = 1.0, True  # statistics that stood still are in use, too
        with synced(model):
            for where, inputs, ranks in reader.in_step(loader, most):
                for statistics in pooled:
                    statistics.ranks = ranks
                reader.call(inner(model), to_device(inputs, device), where)
                read += 1
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, tracks) in zip(norms, settings, strict=True):
            norm.momentum, norm.track_running_stats = momentum, tracks
    reached = [one for one in pooled if one.count]
    for statistics in reached:
        if statistics.count < 2:
            raise ConfigError(
                "reestimate_bn_: expected two values of each channel at least, found one, which has no variance. "
                "Give more samples."
            )
        _store(statistics.module, statistics.mean, statistics.var)
        if statistics.module.num_batches_tracked is not None:
            statistics.module.num_batches_tracked.fill_(read)
    return read, {one.module for one in reached}


def _relative(
    model: nn.Module, norms: Sequence[_BatchNorm], reader: BatchReader, loader: Iterable[Any], most: int | None
) -> tuple[int, set[_BatchNorm]]:
    """Move the statistics by what quantization changes on some batches; gives back the same."""
    moved = [_Relative(norm) for norm in norms]
    handles = [one.module.register_forward_pre_hook(one.look, with_kwargs=True) for one in moved]
    device = next(model.parameters()).device
    read = 0
    try:
        for where, found, _ in reader.in_step(loader, most):
            inputs = to_device(found, device)
            for one in moved:
                one.put_back()
            float_outputs(inner(model), inputs)
            for one in moved:
                one.quantizing = True
            reader.call(inner(model), inputs, where)
            read += 1
    finally:
        for handle in handles:
            handle.remove()
    reached = [one for one in moved if one.quantized.count]
    for one in reached:
        one.store()
    return read, {one.module for one in reached}


def _input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """The input of a batch norm, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _check_finite(norms: dict[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None and not bool(torch.isfinite(buffer).all()):
                raise NonFiniteError(
                    f"{name}: expected finite statistics, found NaN or infinity. Look for it in the batches and in the "
                    "weights; go back to a state from before the training diverged."
                )


def _store(module: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    for name, value in (("running_mean", mean), ("running_var", var)):
        getattr(module, name).copy_(value)


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
