"""Loss and accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nipq.train.batches import Batch


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Score a model in evaluation mode; its mode is restored.

    Args:
        model: Maps images to logits.
        batches: Images and labels.

    Returns:
        ``loss`` (mean cross entropy), ``accuracy`` (per cent, 0 to 100) and ``count`` (images).
    """
    tensor = next(model.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    training = model.training
    model.eval()
    loss, hits, count = 0.0, 0, 0
    try:
        for images, labels in batches:
            labels = labels.to(device)
            logits = model(images.to(device)).float()
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    finally:
        model.train(training)
    return {"loss": loss / count, "accuracy": 100.0 * hits / count, "count": count}
