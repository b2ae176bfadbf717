"""Directions as long as the filters, a grid around the trained weights, and the weights back afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from nipq.analysis.landscape import filter_normalised_direction, landscape
from nipq.analysis.network import stored_weights


def test_each_filter_of_a_direction_is_as_long_as_the_weights(network) -> None:
    weights, direction = stored_weights(network), filter_normalised_direction(network, 3)
    assert weights.keys() == direction.keys()
    for name, weight in weights.items():
        assert torch.allclose(direction[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-5)
    assert all(torch.equal(d, filter_normalised_direction(network, 3)[name]) for name, d in direction.items())
    assert not torch.equal(direction["7.weight"], filter_normalised_direction(network, 4)["7.weight"])


def test_output_channels_of_transposed_convolutions_are_filters_and_zero_filters_stay() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ConvTranspose2d(4, 4, 2, groups=2))
    nn.init.zeros_(model[0].weight[:, 2])
    first, grouped = filter_normalised_direction(model, 0).values()
    found, wanted = (x.detach().square().sum(dim=(0, 2, 3)) for x in (first, model[0].weight))
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert float(first[:, 2].abs().max()) == 0
    assert float(grouped.norm()) == pytest.approx(float(model[1].weight.detach().norm()), rel=1e-5)  # as one filter


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_trained_network_is_in_the_middle_and_is_restored(network, batches, score, dimensions, unchanged) -> None:
    with unchanged(network):
        found = landscape(network, batches, score, dimensions=dimensions, radius=0.4, points=5, seed=1)
        middle = found.points[len(found.points) // 2]
        assert list(middle.setting.values()) == [0.0] * dimensions
        assert middle.scores == score(network, batches)
    assert len(found.points) == 5**dimensions
    steps = sorted({point.setting["x"] for point in found.points})
    assert steps == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4])
    assert len({point.scores["loss"] for point in found.points}) > 2


def test_the_landscape_of_a_quadratic_loss_is_its_parabola() -> None:
    model = nn.Linear(6, 4).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def score(model, batches):
        return {"loss": mse_loss(model(batches[0][0]), batches[0][1]).item()}

    found = landscape(model, [(x, y)], score, dimensions=2, points=3, seed=5)
    first, second = (filter_normalised_direction(model, seed)["weight"] for seed in (5, 6))
    for point in found.points:
        moved = model.weight + point.setting["x"] * first + point.setting["y"] * second
        expected = mse_loss(nn.functional.linear(x, moved, model.bias), y)
        assert point.scores["loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_an_interrupted_landscape_restores_the_weights(quantized, batches, unchanged) -> None:
    def interrupt(model, batches):
        raise KeyboardInterrupt

    with unchanged(quantized), pytest.raises(KeyboardInterrupt):
        landscape(quantized, batches, interrupt)
