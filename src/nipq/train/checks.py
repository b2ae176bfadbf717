"""Checks of a run: settings that cannot work, before its first step; losses and states that are not finite, later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nipq.budget.bit_table import FeasibleRange
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize, check_feasible
from nipq.distributed import part, reduce_min_, reduce_sum_
from nipq.errors import ConfigError, NonFiniteError, require
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model, copy_of, tensors_in
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.train.batches import Nested, Sources, TensorSplit, count_of, pick

if TYPE_CHECKING:
    from nipq.train.config import BudgetConfig, TrainConfig
    from nipq.train.task import Task

#: Advice about numbers that are not finite.
ADVICE = (
    "look for NaN in the data; mend them and continue from the last checkpoint with --resume, or start a new run "
    "folder with a lower optimizer.lr or range_lr"
)

#: Shapes of inputs, among those of all batches, that a model is run on before the first step.
MOST_SHAPES = 8

# ---------------------------------------------------------------------- before the first step


def make_budget(config: BudgetConfig) -> Budget:
    """Build the budget of a config: all of its limits joined; ConfigError if one cannot be read."""
    parts: list[Budget] = []
    average = config.average_bits
    if average is not None:
        parts.append(AverageBits(weights=average.weights, activations=average.activations, mode=config.mode))
    if config.model_size is not None:
        parts.append(ModelSize(config.model_size, mode=config.mode))
    if config.bit_ops is not None:
        parts.append(BitOps(config.bit_ops, mode=config.mode))
    return reduce(and_, parts)


def preflight(
    model: nn.Module, example: Nested, data: Sources, task: Task, config: TrainConfig, budget: Budget | None
) -> list[FeasibleRange]:
    """Check before the first step that model, data, settings and budget fit: run the model, prepare a copy of it.

    Args:
        model: the float model on the CPU.
        example: inputs of one test sample.
        data: the splits; those for validation and test, and a training split in memory, are looked at as a whole.
        task: the task.
        config: the run's config.
        budget: the budget, or ``None``.

    Returns:
        The range within reach of each limit.

    Raises:
        ConfigError: if they do not fit each other.
        NonFiniteError: if a sample holds NaN.
        BudgetError: if the budget is out of reach, naming the range.
        NotQuantizableError: if the model cannot be prepared.
        MissingDependencyError: if the allocation needs a package that is not there.
    """
    trial = copy_of(model).eval()
    outputs = _outputs(trial, example, config, "the test split")
    task.check(outputs, data)
    shapes = {str(_shape(example))}
    for name, split in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if split is None or (name == "training" and not isinstance(split, TensorSplit)):
            continue  # training samples that are decoded or made when they are needed are looked at in their first step
        for number, (inputs, targets) in enumerate(split):
            where = f"batch {number} of the {name} split"
            _check_batch(inputs, targets, where)
            task.check_targets(targets, outputs, where)
            one = pick(inputs, slice(1))
            if len(shapes) < MOST_SHAPES and str(_shape(one)) not in shapes:
                shapes.add(str(_shape(one)))
                task.check(_outputs(trial, one, config, where), data)
    prepare_(trial, example, config.quantization)
    if (
        config.allocation in ("sensitivity", "uniform", "hawq")
        and budget is None
        and any(not found.is_frozen for found in quantizers(trial))
    ):
        raise ConfigError(
            f"expected a budget for allocation {config.allocation!r}, found none while bit-widths are open; "
            "give a budget, or fix weight_bits and activation_bits in quantization"
        )
    if config.allocation == "hawq":
        require("curvlinops", extra="analysis", purpose="allocation 'hawq'")
    return [] if budget is None else check_feasible(trial, budget)


def _outputs(model: nn.Module, inputs: Nested, config: TrainConfig, where: str) -> Any:  # noqa: ANN401
    try:
        with torch.no_grad():
            return call_model(model, inputs)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"model {config.model.factory!r} cannot take inputs of shape {_shape(inputs)} out of {where}: {error}; "
            "correct model.factory, model.kwargs or the data section"
        ) from error


def _check_batch(inputs: Nested, targets: Nested | None, where: str) -> None:
    """Refuse a batch without samples, with NaN, or of inputs and targets that differ in number."""
    samples = count_of(inputs)
    for what, value in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors_in(value):
            if len(tensor) != samples or not samples:
                raise ConfigError(
                    f"{where}: expected one entry of the {what} for each of its {samples} samples, at least one, found "
                    f"{len(tensor)}; correct the data"
                )
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                sample = int(tensor.isnan().flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
                raise NonFiniteError(
                    f"{where}: expected numbers, found NaN in the {what} of sample {sample}; leave the sample out"
                )


def _shape(value: Nested) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    return tuple(value.shape) if isinstance(value, Tensor) else {key: tuple(t.shape) for key, t in value.items()}


# ---------------------------------------------------------------------- while it trains


class Tally:
    """Sums of loss and metric over an epoch's steps, on the device, and the first step whose loss was not finite.

    Args:
        device: the device of the losses.
        sums: loss, metric and number of samples of the epoch's earlier steps, of all processes.
    """

    def __init__(self, device: torch.device, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """Start with what is known."""
        self._before = list(sums)
        self._added = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad_step = torch.full((), math.inf, dtype=torch.float64, device=device)  # of all processes
        self.own_bad_step = self.bad_step.clone()

    @torch.no_grad()
    def add(self, loss: Tensor, score: Tensor | float | None, count: int) -> None:
        """Count a step.

        Args:
            loss: mean over its samples, shape ().
            score: sum of the metric over its samples; ``None`` if the task has none.
            count: number of samples.
        """
        self._added[0] += loss.detach().double() * count
        self._added[1] += math.nan if score is None else score
        self._added[2] += count

    @torch.no_grad()
    def watch(self, total: Tensor, step: int) -> Tensor:
        """Remember the first step whose loss is not finite, in any process: averaged gradients carry it to all.

        Args:
            total: the loss that backward starts from, shape ().
            step: the step.

        Returns:
            1.0 from that step on, else 0.0, float32, no dimensions, on the device.
        """
        bad = torch.where(total.isfinite(), math.inf, float(step)).double()
        self.own_bad_step = torch.minimum(self.own_bad_step, bad)
        self.bad_step = torch.minimum(self.bad_step, bad)
        reduce_min_([self.bad_step])
        return self.bad_step.isfinite().float()

    def look(self) -> list[float]:
        """Sums so far, of this process since they were last gathered (waits for the device)."""
        return [a + b for a, b in zip(self._before, self._added.tolist(), strict=True)]

    def gather(self) -> list[float]:
        """Sums so far, of all processes (waits for the device, and for the other processes)."""
        reduce_sum_([self._added])
        self._before = self.look()
        self._added.zero_()
        return self._before


# ---------------------------------------------------------------------- numbers that are not finite


def non_finite_state(model: nn.Module) -> str | None:
    """Name of the first clipping range, parameter or buffer that is not finite; ``None`` when all are finite."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not bool(module.alpha.isfinite().all()):
            return f"the clipping range of {module.name or name}"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(part(tensor).isfinite().all()):
            return name
    return None


def check_state(model: nn.Module, when: str) -> None:
    """Raise NonFiniteError, with the place in the run, for a model that holds a number that is not finite."""
    found = non_finite_state(model)
    if found is not None:
        raise NonFiniteError(f"expected finite numbers {when}, found NaN or infinity in {found}; {ADVICE}")


def check_scores(scores: Mapping[str, float], when: str) -> None:
    """Refuse scores that are not finite: a sample with NaN, or a model that diverged.

    Args:
        scores: by name.
        when: what they are of, for the message.

    Raises:
        NonFiniteError: naming the score.
    """
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"expected finite scores in {when}, found {name} {value}; {ADVICE}")


def non_finite_loss(model: nn.Module, inputs: Nested, when: str, *, rerun: bool = True) -> NonFiniteError:
    """The error for a loss that is not finite, with its origin.

    Looks at the clipping ranges and parameters first, then runs the inputs once more and takes the first module whose
    output is not finite while its inputs are.

    Args:
        model: the model that gave the loss, in training mode.
        inputs: the inputs of that loss.
        when: the place in the run, for the message.
        rerun: whether the model can be run; not where other processes hold parts of it.

    Returns:
        The error to raise.
    """
    found = non_finite_state(model)
    if found is not None:
        origin = f"in {found}"
    else:
        origin = _first_output(model, inputs) if rerun else "on the way to the loss (parameters are finite)"
    return NonFiniteError(f"expected a finite loss {when}, found NaN or infinity {origin}; {ADVICE}")


def _first_output(model: nn.Module, inputs: Nested) -> str:
    if not _all_finite(inputs):
        return "already in the inputs"
    names: list[str] = []

    def watch(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                names.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(module.name if isinstance(module, TensorQuantizer) else name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f"first in the output of {names[0]}" if names else "in the loss itself (targets, teacher or budget penalty)"


def _all_finite(value: Nested) -> bool:
    tensors = [value] if isinstance(value, Tensor) else list(value.values())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
