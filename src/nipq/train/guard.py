"""Stop at the first number that is not finite, and name the layer it came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed import part
from nipq.errors import NonFiniteError
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import call_model
from nipq.train.nested import Nested, all_finite

ADVICE = "lower optimizer.lr or boundary_lr, check the input data, then continue from the last checkpoint with --resume"


def non_finite_state(model: nn.Module) -> str | None:
    """The first boundary, parameter or buffer that is not finite, in words; ``None`` when all are finite."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not bool(module.alpha.isfinite().all()):
            return f"the boundary of {module.name or name}"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(part(tensor).isfinite().all()):
            return name
    return None


def check_state(model: nn.Module, when: str) -> None:
    """Refuse a model that holds a number that is not finite.

    Args:
        model: The model.
        when: Where in the run, for the message.

    Raises:
        NonFiniteError: Naming the first boundary or tensor that is not finite.
    """
    found = non_finite_state(model)
    if found is not None:
        raise NonFiniteError(f"expected finite numbers {when}, found NaN or infinity in {found}; {ADVICE}")


def non_finite_loss(model: nn.Module, inputs: Nested, when: str, *, rerun: bool = True) -> NonFiniteError:
    """The error for a loss that is not finite, with its origin.

    Looks at the boundaries and parameters first, then runs the inputs once more and takes the first module whose
    output is not finite while its inputs are.

    Args:
        model: The model that gave the loss, in training mode.
        inputs: The inputs it gave it for.
        when: Where in the run, for the message.
        rerun: Whether the model can be run; not where other processes hold parts of it.

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
    if not all_finite(inputs):
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
