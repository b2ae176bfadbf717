"""The normal form of a cost."""

from __future__ import annotations

import pytest
import torch

from nipq.errors import ConfigError
from nipq.functional.cost import CostForm, cost


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def form() -> CostForm:
    """Three layers on two weight tensors: the last two are tied."""
    return CostForm(1000.0, f64(10, 20), f64(1, 2, 3), f64(100, 200, 300), torch.tensor([0, 1, 1]))


def test_cost_is_the_sum_written_out() -> None:
    got = cost(form(), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    assert got.dtype == torch.float64
    assert got.item() == 1000 + 20 + 60 + 4 + 10 + 18 + 100 * 2 * 4 + 200 * 3 * 5 + 300 * 3 * 6


def test_b3_activation_bits_of_every_layer_get_a_gradient() -> None:
    """The release lost it: each layer was costed at the bits of the first."""
    wb, ab = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([4.0, 5.0, 6.0], requires_grad=True)
    by_weight, by_activation = torch.autograd.grad(cost(form(), wb, ab), (wb, ab))
    assert by_activation.tolist() == [1 + 100 * 2, 2 + 200 * 3, 3 + 300 * 3]
    assert by_weight.tolist() == [10 + 100 * 4, 20 + 200 * 5 + 300 * 6]


def test_b4_weight_bits_do_not_leak_into_an_activation_cost() -> None:
    activations_only = CostForm(0.0, f64(0, 0), f64(5, 7, 9), f64(0, 0, 0), torch.tensor([0, 1, 1]))
    ab = torch.tensor([4.0, 4.0, 4.0])
    assert cost(activations_only, torch.tensor([2.0, 2.0]), ab) == cost(activations_only, torch.tensor([8.0, 8.0]), ab)


def test_counts_beyond_float32_are_exact() -> None:
    """A few thousand million multiply-accumulates at odd bits pass 2^24 by far."""
    macs = 10_837_900_033.0
    one = CostForm(0.0, f64(0), f64(0), f64(macs), torch.tensor([0]))
    assert cost(one, torch.tensor([3.0]), torch.tensor([7.0])).item() == macs * 21


def test_mobilenet_v2_sanity_row() -> None:
    """Section 1.8: 300.8 M multiply-accumulates at W4A4 with an 8x8 first layer of 10.8 M are 5.33 G."""
    macs = CostForm(0.0, f64(0, 0), f64(0, 0), f64(10.8e6, 300.8e6 - 10.8e6), torch.tensor([0, 1]))
    assert cost(macs, torch.tensor([8.0, 4.0]), torch.tensor([8.0, 4.0])).item() / 1e9 == pytest.approx(5.33, abs=5e-3)
    assert cost(macs, torch.tensor([4.0, 4.0]), torch.tensor([4.0, 4.0])).item() / 1e9 == pytest.approx(4.81, abs=5e-3)


def test_a_form_without_layers_is_its_constant() -> None:
    empty = CostForm(7.0, f64(), f64(), f64(), torch.empty(0, dtype=torch.int64))
    assert cost(empty, torch.empty(0), torch.empty(0)).item() == 7


def test_moving_a_form_keeps_it() -> None:
    moved = form().to("cpu")
    bits = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    assert cost(moved, *bits) == cost(form(), *bits)
    assert form().to("meta").product.device.type == "meta"


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected float64 costs and an int64 weight_of_layer"):
        CostForm(0.0, torch.ones(1), f64(1), f64(1), torch.tensor([0]))
    with pytest.raises(ConfigError, match="expected float64 costs and an int64 weight_of_layer"):
        CostForm(0.0, f64(1), f64(1), f64(1), f64(0))
    with pytest.raises(ConfigError, match=r"found \[\(1,\), \(1,\), \(2,\), \(1,\)\]"):
        CostForm(0.0, f64(1), f64(1), f64(1, 2), torch.tensor([0]))
    with pytest.raises(ConfigError, match="expected 2 weight and 3 activation bit-widths; found shapes"):
        cost(form(), torch.ones(3), torch.ones(3))
