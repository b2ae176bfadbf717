"""The networks that are timed, with a batch each. Weights and data are random: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.errors import require

CLASSES = 1000


class Network(NamedTuple):
    """One network.

    Attributes:
        build: makes it, its weights random.
        shape: of one sample.
        batch: samples of a step.
        layouts: memory formats that it is timed in.
        shown: a name to show.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    layouts: tuple[str, ...]
    shown: str

    def data(self, layout: str) -> tuple[Tensor, Tensor]:
        """Inputs in a layout, and labels."""
        x = torch.randn(self.batch, *self.shape)
        return in_layout(x, layout), torch.randint(CLASSES, (self.batch,))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """An image batch in a memory format by name; anything else as it is."""
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


class EncoderLayer(nn.Module):
    """Attention and two linear layers as in MiniLM, post-norm."""

    def __init__(self, width: int = 384, heads: int = 12, hidden: int = 1536) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] to the same."""
        q, k, v = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first_norm(x + self.out(attended))
        out: Tensor = self.second_norm(x + self.down(functional.gelu(self.up(x))))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Encoder(nn.Module):
    """Six layers, the mean over tokens, a classifier; from embeddings on."""

    def __init__(self, layers: int = 6, width: int = 384) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(width) for _ in range(layers)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] to [N, classes]."""
        scores: Tensor = self.head(self.layers(x).mean(1))
        return scores


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = require("torchvision.models", extra="vision", purpose="the networks of the benchmarks")
        model: nn.Module = getattr(models, name)(num_classes=CLASSES)
        return model

    return build


BOTH = ("contiguous", "channels_last")
NETWORKS = {
    "resnet18": Network(_torchvision("resnet18"), (3, 96, 96), 32, BOTH, "ResNet-18"),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), (3, 96, 96), 32, BOTH, "MobileNet-v2"),
    "encoder": Network(Encoder, (64, 384), 16, ("contiguous",), "encoder"),
}
