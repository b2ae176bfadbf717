"""Distance of a quantized network's outputs from the float network's own, for outputs of any structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.distributed import inner, reduce_mean_
from nipq.errors import ConfigError, NonFiniteError
from nipq.prepare.batches import BatchReader, Inputs, call_model, evaluating, to_device
from nipq.prepare.input_form import ExampleInputs, tensors_in
from nipq.prepare.layer_table import phase_of, quantizers, set_phase_

#: Least variance that an output is divided by, so that a constant output has a finite distance.
LEAST_VARIANCE = 1e-12


@torch.no_grad()
def float_outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Outputs of a prepared model in phase ``"float"``, that is of the network without its quantizers.

    Args:
        model: a prepared model, in evaluation mode; its phase is restored.
        inputs: what it is called with, on its device.

    Returns:
        Its floating-point output tensors, see :func:`floats_in`.
    """
    phase = phase_of(model)
    set_phase_(model, Phase.FLOAT)
    try:
        return floats_in(call_model(model, inputs))
    finally:
        set_phase_(model, phase)


def floats_in(outputs: object) -> list[Tensor]:
    """Floating-point tensors in an output: a tensor, or mappings, tuples and lists of them, however deep.

    A number without axes beside others, such as the loss that a model of transformers returns for labels, is left out.

    Args:
        outputs: what a model returned, such as logits or a ``ModelOutput`` of transformers.

    Returns:
        The tensors, in the order of the structure.

    Raises:
        ConfigError: if there is none.
    """
    found = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not found:
        raise ConfigError(
            f"expected a model that returns floating-point tensors, alone or in tuples, lists and mappings; found "
            f"{type(outputs).__name__}. Wrap the model so that it returns them, or give loss_fn."
        )
    return [tensor for tensor in found if tensor.ndim] or found


def check_outputs(model: nn.Module, outputs: list[Tensor]) -> None:
    """Refuse NaN and infinity in outputs of a float model.

    Args:
        model: the model, for its name.
        outputs: see :func:`floats_in`.

    Raises:
        NonFiniteError: if there is some.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        raise NonFiniteError(
            f"{type(model).__name__}: expected finite outputs of the float model, found NaN or infinity. "
            "Check the float model and its inputs."
        )


def output_distance(outputs: Any, reference: list[Tensor]) -> Tensor:  # noqa: ANN401  (whatever a model returns)
    """Squared error of outputs relative to the variance of the float network's: 0 is equal, 1 is a constant guess.

    For each tensor sum (y - r)^2 / sum (r - mean r)^2 over all of its elements, and the mean of these over tensors, so
    that each counts alike whatever its unit. It is 1 / SQNR and needs to know nothing about what the outputs mean. A
    tensor of one element has no variance and is divided by its own square.

    Args:
        outputs: what the quantized network returned.
        reference: of the float network on the same inputs, see :func:`float_outputs`.

    Returns:
        A number >= 0, no dimensions, differentiable in the outputs.

    Raises:
        ConfigError: if the two do not hold the same tensors.

    Example:
        >>> output_distance(torch.tensor([1.0, 3.0]), [torch.tensor([1.0, 2.0])])
        tensor(2.)
    """
    found = floats_in(outputs)
    shapes, expected = [list(y.shape) for y in found], [list(r.shape) for r in reference]
    if shapes != expected:
        raise ConfigError(
            f"expected outputs of the shapes of the float model's, {expected}; found {shapes}. "
            "Give a model whose outputs do not change their shapes."
        )
    return torch.stack([_relative_error(y.float(), r.float()) for y, r in zip(found, reference, strict=True)]).mean()


def _relative_error(y: Tensor, r: Tensor) -> Tensor:
    centre = r.mean() if r.numel() > 1 else 0.0
    return (y - r).square().mean() / (r - centre).square().mean().clamp(min=LEAST_VARIANCE)


@dataclass(frozen=True)
class Judgement:
    """Distance and agreement of a quantized network with the float network on some batches.

    Attributes:
        distance: mean over batches of :func:`output_distance`.
        agreement: share of samples whose largest output is the same, in per cent; None where outputs are not one
            tensor [N, C] with two columns or more.
    """

    distance: float
    agreement: float | None


class OutputJudge:
    """Nearness of a prepared model's outputs to those of the float network, on batches that are kept.

    Args:
        model: a prepared model.
        batches: read once, on this rank.
        reference: the float network in evaluation mode; if left out, the model in phase ``"float"`` as it is now.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Raises:
        ConfigError: if there is no batch.
        NonFiniteError: if an output of the float network is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        reference: nn.Module | None = None,
        *,
        inputs: Inputs | None = None,
    ) -> None:
        self._model = model
        self._kept: list[tuple[ExampleInputs, list[Tensor]]] = []
        device = next(model.parameters()).device
        reader = BatchReader(model, inputs, "held-out data")
        with rounding(model), torch.no_grad():
            for where, batch in reader.read(batches):
                given = to_device(reader.inputs(batch, where), device)
                truth = (
                    float_outputs(inner(model), given) if reference is None else floats_in(call_model(reference, given))
                )
                check_outputs(model, truth)
                self._kept.append((given, truth))

    def distance(self) -> float:
        """Mean over the batches, of all ranks, of :func:`output_distance`; evaluation with the true quantizers."""
        return self.judge().distance

    @torch.no_grad()
    def judge(self) -> Judgement:
        """Distance and agreement, evaluated with the true quantizers; mean over ranks."""
        distances, same, count = [], 0.0, 0
        with rounding(self._model):
            for inputs, truth in self._kept:
                outputs = call_model(inner(self._model), inputs)
                distances.append(float(output_distance(outputs, truth)))
                if _is_classifier(truth):
                    same += float((floats_in(outputs)[0].argmax(1) == truth[0].argmax(1)).sum())
                    count += len(truth[0])
        means = torch.tensor([sum(distances) / len(distances), 100 * same / max(count, 1)], dtype=torch.float64)
        reduce_mean_([means])
        return Judgement(float(means[0]), float(means[1]) if count else None)


def _is_classifier(outputs: list[Tensor]) -> bool:
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


@contextmanager
def rounding(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and true quantizers meanwhile; modes and phases are restored.

    Args:
        model: a prepared model.
    """
    phases = {quantizer: quantizer.phase for quantizer in quantizers(model)}
    set_phase_(model, Phase.ROUND)  # leaves phase int, in which batch norms are folded away
    try:
        with evaluating(model):
            yield
    finally:
        if Phase.INT in phases.values():
            set_phase_(model, Phase.INT)
        else:
            for quantizer, phase in phases.items():
                quantizer.phase = phase
