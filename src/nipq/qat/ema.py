"""Exponential moving average (EMA) of a model in training, quantizer parameters and batch norms included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.distributed import like, part
from nipq.errors import ConfigError


class WeightAverage:
    """Average of parameters over the steps of training: average <- decay * average + (1 - decay) * model.

    It starts as a copy of the model. Averaged are all floating parameters, clipping ranges and bit-widths as the raw
    parameters that are trained (so the average of what was inside their ranges stays inside), and the running
    statistics of batch norms. Half-precision parameters are averaged in float32. Parameters that leave the model, such
    as bit-widths when they are frozen, leave the average; new ones enter with their present value. Each rank averages
    its part of sharded parameters; nothing is sent.

    Args:
        model: the model.
        decay: share that is kept at each update, 0 <= decay < 1; 0.999 averages about the last 1000 steps.

    Raises:
        ConfigError: if the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_decay(decay, "WeightAverage")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self.update(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of training into account; call it after the optimizer's step.

        Args:
            model: the model, in any phase.
        """
        present = {name: _wide(tensor) for name, tensor in _averaged(model).items()}
        self._average = {
            name: self._average[name] if name in self._average else tensor.clone() for name, tensor in present.items()
        }
        for name, tensor in present.items():  # the model may have moved to another device, or been sharded
            if self._average[name].device != tensor.device:
                self._average[name] = self._average[name].to(tensor.device)
            self._average[name] = like(self._average[name], tensor)
        average, values = ([part(t) for t in group.values()] for group in (self._average, present))
        torch._foreach_lerp_(average, values, 1 - self.decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the average in it, for evaluation; its own values come back at the end.

        Args:
            model: the model.

        Yields:
            The same model.
        """
        kept = {name: tensor.detach().clone() for name, tensor in _averaged(model).items()}
        self.copy_to_(model)
        try:
            yield model
        finally:
            _copy(kept, model)

    def copy_to_(self, model: nn.Module) -> None:
        """Make the average the model.

        Args:
            model: the model.
        """
        _copy(self._average, model)

    def state_dict(self) -> dict[str, Any]:
        """The decay and the averaged tensors, by name."""
        return {"decay": self.decay, "average": {name: tensor.clone() for name, tensor in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average.

        Args:
            state: what ``state_dict`` returned.
        """
        self.decay = state["decay"]
        self._average = {name: tensor.clone() for name, tensor in state["average"].items()}


def check_decay(decay: object, where: str) -> None:
    """Refuse a decay that is no share below 1.

    Args:
        decay: of an average.
        where: whose argument it is, for the message.

    Raises:
        ConfigError: if it is out of range.
    """
    if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay < 1:
        raise ConfigError(f"{where}: expected a decay from 0 to below 1, found {decay!r}. Try 0.999.")


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are averaged, each once, by name."""
    found: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()
    }
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for name in ("running_mean", "running_var"):
                buffer = getattr(module, name)
                if buffer is not None:
                    found[f"{prefix}.{name}"] = buffer
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@torch.no_grad()
def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
    """Write values into the model's tensors of the same name."""
    for name, tensor in _averaged(model).items():
        if name in values:
            tensor.copy_(like(values[name], tensor))
