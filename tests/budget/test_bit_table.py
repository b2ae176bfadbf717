"""All bit-widths in one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nipq.budget.bit_table import BitTable
from nipq.config import Config, Rule
from nipq.errors import NonFiniteError, OrderError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).relu()).relu())

    rules = (Rule("second", activation_bits={2, 4, 8}), Rule("head", weight_bits=(3, 7), activation_bits=5))
    return prepare_(Tied(), torch.zeros(1, 4), Config(rules=rules))


def test_weights_come_first_and_each_once_and_fixed_bits_have_one_choice() -> None:
    table = BitTable(layer_table(tied()))
    assert [q.name for q in table.quantizers] == [
        "first.weight",
        "head.weight",
        "first.input",
        "second.input",
        "head.input",
    ]
    assert table.choices == ((2, 3, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7), (8,), (2, 4, 8), (5,))
    assert table.weight_of_input.tolist() == [0, 0, 1]


def test_the_vector_equals_the_quantizers_and_carries_their_gradients() -> None:
    model = tied()
    table = BitTable(layer_table(model))
    learned = [q for q in table.quantizers if not q.is_frozen]
    for place, quantizer in enumerate(learned):
        nn.init.constant_(quantizer.bit_raw, place - 1.0)
    bits = table.bits()
    torch.testing.assert_close(bits.float(), torch.cat([q.bits for q in table.quantizers]))
    bits.sum().backward()
    for quantizer in learned:
        expected = torch.autograd.grad(quantizer.bits.sum(), quantizer.bit_raw)[0]
        torch.testing.assert_close(quantizer.bit_raw.grad, expected)


def test_rounding_picks_the_nearest_choice_the_lower_of_two_and_passes_gradients() -> None:
    table = BitTable(layer_table(tied()))
    bits = torch.tensor([3.5, 2.1, 6.0, 6.0, 9.0], dtype=torch.float64, requires_grad=True)
    rounded = table.round(bits)
    assert rounded.tolist() == [3, 3, 8, 4, 5]
    rounded.sum().backward()
    assert bits.grad.tolist() == [1.0] * 5


def test_bits_that_are_not_finite_are_named() -> None:
    model = tied()
    nn.init.constant_(model.second.quantization.input.bit_raw, float("nan"))
    table = BitTable(layer_table(model))
    with pytest.raises(NonFiniteError, match=r"second\.input: expected a finite bit-width, found nan"):
        table.check_finite(table.bits())


def test_bits_frozen_after_the_table_was_built_are_named() -> None:
    model = tied()
    table = BitTable(layer_table(model))
    table.weights[1].freeze_bits_(4)
    with pytest.raises(OrderError, match=r"head\.weight: .* frozen since"):
        table.bits()
