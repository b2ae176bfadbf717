"""Which layers are known, by class or by name, and where their channels lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nipq.nn import kinds
from nipq.nn.kinds import (
    channel_dim,
    is_conv1d,
    is_plain,
    is_supported,
    is_table,
    kind_of,
    output_channels,
    shell_class,
    weight_channel_axis,
)
from tests.nn.gpt2 import Conv1D


class Louder(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


@pytest.mark.parametrize(
    ("layer", "kind", "dim", "axis", "channels"),
    [
        (nn.Linear(3, 5), nn.Linear, -1, 0, 5),
        (Conv1D(5, 3), Conv1D, -1, 1, 5),
        (nn.Embedding(7, 4), nn.Embedding, -1, 0, 7),
        (ScaledEmbedding(7, 4), nn.Embedding, -1, 0, 7),
        (nn.Conv2d(3, 5, 2), nn.Conv2d, -3, 0, 5),
        (nn.ConvTranspose1d(3, 5, 2), nn.ConvTranspose1d, -2, 1, 5),
    ],
)
def test_what_is_known_of_a_layer(layer: nn.Module, kind: type, dim: int, axis: int, channels: int) -> None:
    assert kind_of(layer) is kind
    assert (channel_dim(layer), weight_channel_axis(layer), output_channels(layer)) == (dim, axis, channels)
    assert is_table(layer) == isinstance(layer, nn.Embedding)
    assert is_conv1d(layer) == isinstance(layer, Conv1D)
    assert is_plain(layer) == (type(layer) is kind)


def test_a_name_alone_makes_no_conv1d_and_a_subclass_is_another_layer() -> None:
    class Conv1D(nn.Module):
        pass

    assert not is_supported(Conv1D())
    assert not is_supported(Louder(2, 2))
    assert not is_supported(nn.EmbeddingBag(2, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_the_shell_of_a_conv1d_computes_the_same_and_needs_no_bias(bias: bool) -> None:
    layer, x = Conv1D(5, 3), torch.randn(2, 4, 3)
    assert shell_class(layer) is kinds.Conv1D
    shell = kinds.Conv1D()
    shell.weight, shell.bias = layer.weight, layer.bias if bias else None
    expected = layer(x) if bias else layer(x) - layer.bias
    assert torch.allclose(shell(x), expected, atol=1e-6)
