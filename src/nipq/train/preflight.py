"""What can be known to be wrong before the first training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nipq.budget.budget import AverageBits, BitOps, Budget, FeasibleRange, ModelSize, check_feasible
from nipq.errors import ConfigError, require
from nipq.prepare.batches import call_model
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.train.nested import Nested, shape_of

if TYPE_CHECKING:
    from nipq.train.config import BudgetConfig, TrainConfig


def make_budget(config: BudgetConfig) -> Budget:
    """The budget that a config names: all of its limits joined.

    Args:
        config: The ``budget`` section.

    Returns:
        The budget.

    Raises:
        ConfigError: If a size or a number of operations cannot be read.
    """
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
    model: nn.Module, example: Nested, config: TrainConfig, budget: Budget | None, check: Callable[[Any], None]
) -> list[FeasibleRange]:
    """Run the model once, prepare a copy of it, and look whether the budget can be met.

    Args:
        model: The float model on the CPU.
        example: Inputs of one sample.
        config: The run's config.
        budget: The budget, or ``None``.
        check: Refuses outputs that do not fit the data.

    Returns:
        The range within reach of each limit.

    Raises:
        ConfigError: If the model does not take the inputs, its outputs are refused, or bits are to be allocated
            without a budget.
        BudgetError: If the budget is out of reach, naming the range.
        NotQuantizableError: If the model cannot be prepared.
        MissingDependencyError: If the allocation needs a package that is not there.
    """
    trial = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            outputs = call_model(trial, example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model {config.model.factory!r} cannot take inputs of shape {shape_of(example)}: {error}; "
            "correct model.factory, model.kwargs or the data section"
        ) from error
    check(outputs)
    prepare_(trial, example, config.quantization)
    if config.allocation != "learned" and budget is None and any(not found.is_frozen for found in quantizers(trial)):
        raise ConfigError(
            f"expected a budget for allocation {config.allocation!r}, found none while bit-widths are open; "
            "give a budget, or fix weight_bits and activation_bits in quantization"
        )
    if config.allocation == "hawq":
        require("curvlinops", extra="analysis", purpose="allocation 'hawq'")
    return [] if budget is None else check_feasible(trial, budget)
