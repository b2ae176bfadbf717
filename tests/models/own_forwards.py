"""Layers with a forward of their own: two that do more than their operation, one that is its operation and a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Gained(nn.Conv2d):
    """Does more than its operation: kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x)) * self.gain


class Padded(nn.Conv2d):
    """Its operation and a bias: run on whole codes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


class ScaledTable(nn.Embedding):
    """Gemma's: kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        scaled: Tensor = super().forward(rows) * self.embed_scale
        return scaled
