"""Products with the Hessian of a network's mean loss, through curvlinops, which never forms it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import relu6
from torch.overrides import TorchFunctionMode

from nipq.analysis.network import LossFn
from nipq.errors import ConfigError, require
from nipq.prepare.batches import ExampleInputs, call_model, inputs_of, to_device


@dataclass(frozen=True)
class LabelledBatch:
    """What a loader yields, in parts.

    Attributes:
        inputs: what the network is called with.
        targets: what the loss compares its outputs with.
        count: number of samples.
    """

    inputs: ExampleInputs
    targets: Any
    count: int


def labelled(batches: Iterable[Any], device: torch.device) -> list[LabelledBatch]:
    """Read batches.

    Args:
        batches: tuples or lists, the inputs first and the targets second.
        device: where they are wanted.

    Returns:
        All of them.

    Raises:
        ConfigError: if there is none, or one without targets.
    """
    found = []
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ConfigError(
                f"Hessian: expected batches of inputs and targets, found {type(batch).__name__}. "
                "Let the loader yield (inputs, targets)."
            )
        inputs = to_device(inputs_of(batch), device)
        targets = batch[1] if batch[1] is None else to_device(batch[1], device)
        found.append(LabelledBatch(inputs, targets, _count(inputs)))
    if not found:
        raise ConfigError("Hessian: expected at least one batch, found an empty loader. Give some data.")
    return found


def _count(inputs: ExampleInputs) -> int:
    values = [inputs] if isinstance(inputs, Tensor) else inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(len(value) for value in values if isinstance(value, Tensor))


def hessian(
    network: nn.Module, data: Sequence[LabelledBatch], loss_fn: LossFn, parameters: Sequence[nn.Parameter]
) -> Any:  # noqa: ANN401 -- curvlinops has no types
    """The Hessian of the loss, averaged over all samples, in some parameters, as a linear operator.

    Args:
        network: in evaluation mode, without quantizers.
        data: all samples.
        loss_fn: of outputs and targets, a mean over the samples of a batch, twice differentiable.
        parameters: of the network; they must ask for gradients, see :func:`differentiable`.

    Returns:
        A ``curvlinops`` operator: ``operator @ vector``, ``operator @ [tensor, ...]``, ``operator.to_scipy()``.

    Raises:
        MissingDependencyError: without curvlinops.
    """
    curvlinops = _curvlinops()

    class Hessian(curvlinops.HessianLinearOperator):  # type: ignore[misc, name-defined]  # found at run time
        """curvlinops' operator with the product of one batch by plain double backward.

        Its own goes through functional transforms, which are slower on grouped convolutions and refuse some models.
        """

        def _matmat_batch(self, batch: LabelledBatch, _target: Tensor, columns: list[Tensor]) -> list[Tensor]:
            # fused attention has no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _HardSigmoidByReLU6():
                loss = loss_fn(call_model(network, batch.inputs), batch.targets)
                return _products(loss, parameters, columns)

    return Hessian(
        network,
        _Mean(),
        list(parameters),
        [(batch, torch.zeros(())) for batch in data],
        check_deterministic=False,
        batch_size_fn=lambda batch: batch.count,
    )


class _HardSigmoidByReLU6(TorchFunctionMode):
    """Computes hard sigmoids, whose second derivative torch does not have, as the same function relu6(x + 3) / 6."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        if function is torch.nn.functional.hardsigmoid:
            x = args[0] if args else (kwargs or {})["input"]
            return relu6(x + 3) / 6
        return function(*args, **(kwargs or {}))


class _Mean:
    """What curvlinops asks of a loss function here: that batches are to be averaged over their samples."""

    reduction = "mean"


def _products(loss: Tensor, parameters: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """H v for each of several v, which are stacked along the last axis."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    results = []
    for column in zip(*(stack.unbind(-1) for stack in columns), strict=True):
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, column, strict=True)]).sum()
        if slope.requires_grad:
            found = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
        else:  # the loss is linear in them
            found = tuple(torch.zeros_like(v) for v in column)
        results.append(found)
    return [torch.stack(parts, -1) for parts in zip(*results, strict=True)]


def _curvlinops() -> ModuleType:
    with warnings.catch_warnings():
        # One of its own dependencies is compiled on import by torch.jit, which torch has deprecated.
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return require("curvlinops", extra="analysis", purpose="products with the Hessian")
