"""The smallest model with attention, for tests of its quantized products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nipq.config import Config
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
SCORES, MIX = "inner.attention_products.scores", "inner.attention_products.mix"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def prepared(config: Config | None = None) -> nn.Module:
    return calibrate_(prepare_(Net(), X, config or Config(attention_bits=(2, 8))), [X])
