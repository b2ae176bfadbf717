"""The trained model's own noise: sums in another order, for every kind of layer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from nipq.verify.reference import other_kernels


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(257, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("make", [lambda: nn.Linear(257, 5), lambda: nn.Linear(257, 5, bias=False), Conv1D])
def test_a_linear_layer_has_noise_of_rounding_and_no_more(make) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(64, 257)
    with torch.no_grad():
        plain = layer(x)
        with other_kernels():
            other = layer(x)
        exact = deepcopy(layer).double()(x.double()).float()
    assert torch.equal(other, exact)
    assert not torch.equal(plain, other)
    torch.testing.assert_close(other, plain, rtol=0, atol=257 * 2**-23 * float(plain.abs().max()))


def test_other_functions_stay_as_they_are() -> None:
    x = torch.randn(3, 4)
    with other_kernels():
        torch.testing.assert_close(torch.addmm(x, x, torch.eye(4), alpha=2), 3 * x)
        torch.testing.assert_close(nn.functional.linear(input=x, weight=torch.eye(4)), x)
        assert torch.equal(torch.relu(x), x.clamp(min=0))
