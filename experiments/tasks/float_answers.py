"""Tasks without labels: a network learns the answers of the float network that it started from."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.train.factory import build_model
from nipq.train.task import Task

if TYPE_CHECKING:
    from nipq.train.config import ModelConfig, TrainConfig


class FloatAnswers(Task, ABC):
    """Only the distillation loss trains; scores can ask the float network.

    Args:
        original: The section of the float network, with its weights.
    """

    def __init__(self, original: ModelConfig) -> None:
        """Remember which network is asked."""
        self._section = original
        self._network: nn.Module | None = None

    def loss(self, outputs: Any, targets: Any) -> Tensor:  # noqa: ANN401, ARG002 - there are no labels
        """Zero."""
        first: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
        return first.new_zeros(())

    def original(self) -> nn.Module:
        """The float network, built when it is first asked for."""
        if self._network is None:
            self._network = build_model(self._section).eval().requires_grad_(False)
        return self._network


def float_section(config: TrainConfig, module: str, hint: str) -> ModelConfig:
    """The section of the float network: the teacher, or without one the start.

    Args:
        config: The run's config.
        module: Of this folder, whose command writes the published weights.
        hint: Where they come from.

    Returns:
        The section.

    Raises:
        ConfigError: If neither section names weights.
    """
    original = config.teacher or config.model
    if original.weights is None:
        raise ConfigError(
            "expected the float network's weights in teacher.weights or model.weights, found none; write them with "
            f"`python -m experiments.tasks.{module} FOLDER FILE`. {hint}"
        )
    return original
