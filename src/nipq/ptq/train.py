"""Training after post-training quantization, by a QAT session with settings that need no tuning.

The bits are those that post-training quantization chose. Weights and clipping ranges are trained with fake
quantization (rounding with the straight-through estimator), by AdamW and the session's cosine. Batch norms keep their
statistics: those of a few calibration samples are worse than the ones that the network came with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import nn

from nipq.budget.budget import Budget
from nipq.budget.distance import floats_in, output_distance
from nipq.budget.sensitivity import LossFn, check_scalar, targets_of
from nipq.errors import NonFiniteError
from nipq.prepare.batches import call_model, inputs_of, to_device
from nipq.qat.batchnorm import batchnorms
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession

#: Learning rate of AdamW for weights and clipping ranges. Ten times as much served a small network for digits better and
#: ruined a pretrained EfficientNet-Lite0 in 32 steps, see experiments/post_training/README.md.
LR = 1e-4


def train_(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    budget: Budget | None,
    *,
    epochs: int,
    loss_fn: LossFn | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> None:
    """Train a quantized model with frozen bits, in place; it ends in evaluation mode.

    Args:
        model: a prepared model with frozen bits and calibrated ranges.
        teacher: the float model in evaluation mode, whose outputs are the targets where there is no ``loss_fn``.
        loader: batches, read once an epoch.
        budget: the limits, which the frozen bits keep.
        epochs: passes over the loader.
        loss_fn: of outputs and targets; if left out, the distance from the teacher's outputs.
        lr: learning rate; :data:`LR` if left out.
        seed: of torch's generators meanwhile, which are restored.

    Raises:
        NonFiniteError: if the loss is not finite.
        ConfigError: if ``loss_fn`` returns no scalar.
    """
    steps = epochs * (len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader))
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.0), lr=lr or LR)
    session = QATSession(model, budget, steps, optimizer=optimizer, finetune=1.0, batchnorm_batches=0)
    norms = batchnorms(model).values()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        model.train()
        for norm in norms:
            norm.eval()
        for _ in range(epochs):
            for batch in loader:
                inputs = to_device(inputs_of(batch), device)
                outputs = call_model(model, inputs)
                if loss_fn is None:
                    with torch.no_grad():
                        truth = floats_in(call_model(teacher, inputs))
                    loss = output_distance(outputs, truth)
                else:
                    loss = loss_fn(outputs, to_device(targets_of(batch), device))
                    check_scalar(loss)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"training: expected a finite loss, found {float(loss.detach())} at step {session.steps}. "
                        "Lower lr."
                    )
                (loss + session.penalty()).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                session.step()
    session.finish()
