"""Distance of a quantized network's outputs from the float network's own, for outputs of any structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.errors import ConfigError
from nipq.prepare.batches import ExampleInputs, call_model, tensors_in
from nipq.prepare.layer_table import phase_of, set_phase_

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
    return found


def output_distance(outputs: Any, reference: list[Tensor]) -> Tensor:  # noqa: ANN401  (whatever a model returns)
    """Squared error of outputs relative to the variance of the float network's: 0 is equal, 1 is a constant guess.

    For each tensor sum (y - r)^2 / sum (r - mean r)^2 over all of its elements, and the mean of these over tensors, so
    that each counts alike whatever its unit. It is 1 / SQNR and needs to know nothing about what the outputs mean.

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
    variance = (r - r.mean()).square().mean().clamp(min=LEAST_VARIANCE)
    return (y - r).square().mean() / variance
