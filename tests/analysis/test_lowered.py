"""Fewer bits than the network was trained for, with its boundaries or with fitted ones."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nipq.analysis.lowered import lowered_bits, lowered_sweep
from nipq.config import Config
from nipq.errors import OrderError
from nipq.functional.clipping import noise_optimal_range
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_


def quantized_network(network):
    if not any(name.endswith("alpha_raw") for name, _ in network.named_parameters()):
        pytest.skip("a float network has no bits")
    return network


@pytest.mark.parametrize("boundaries", ["kept", "refit"])
def test_bits_fall_to_two_at_least_and_all_is_restored(network, batches, boundaries, unchanged) -> None:
    model = quantized_network(network)
    with unchanged(model):
        rows = layer_table(model)
        before = {row.weight.name: row.weight.bits_rounded for row in rows}
        before |= {row.input.name: row.input.bits_rounded for row in rows}
        clean = model(batches[0][0])
        for by in (1, 20):
            with lowered_bits(model, by, boundaries=boundaries, batches=batches):
                for row in rows:
                    assert row.weight.bits_rounded == max(2, before[row.weight.name] - by)
                    kept = row.spec.is_input
                    expected = before[row.input.name] if kept else max(2, before[row.input.name] - by)
                    assert row.input.bits_rounded == expected
                assert not torch.equal(model(batches[0][0]), clean)
        with pytest.raises(KeyboardInterrupt), lowered_bits(model, 2):
            raise KeyboardInterrupt
        assert torch.equal(model(batches[0][0]), clean)


def test_kept_boundaries_stay_and_fitted_ones_minimise_the_noise_error(network, batches) -> None:
    model = quantized_network(network)
    rows = layer_table(model)
    model(batches[0][0])  # methods that follow the weight have done so
    trained = [row.weight.alpha.detach().clone() for row in rows]
    with lowered_bits(model, 2):
        model(batches[0][0])
        assert all(torch.equal(row.weight.alpha, alpha) for row, alpha in zip(rows, trained, strict=True))
    with lowered_bits(model, 2, boundaries="refit", batches=batches):
        model(batches[0][0])
        for row in rows:
            weight = row.layer.parametrizations.weight.original.detach()
            axis = 0 if row.weight.alpha_raw.numel() > 1 else None
            fitted = noise_optimal_range(weight, float(row.weight.bits_rounded), row.weight.grid, channel_axis=axis)
            assert torch.allclose(row.weight.alpha, fitted, rtol=1e-5)


def test_inputs_are_fitted_on_what_the_quantized_network_computes(quantized, batches) -> None:
    row = layer_table(quantized)[1]
    kept = []
    handle = row.input.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten()))
    for images, _ in batches:
        quantized(images)
    handle.remove()
    with lowered_bits(quantized, 1, boundaries="refit", batches=batches):
        fitted = noise_optimal_range(torch.cat(kept), float(row.input.bits_rounded), row.input.grid)
        assert torch.allclose(row.input.alpha, fitted, rtol=1e-5)


def test_a_sweep_measures_both_ways_and_is_plain_data(quantized, batches, score, unchanged) -> None:
    with unchanged(quantized):
        found = lowered_sweep(quantized, batches, score, by=(1, 3), fitting=batches[:1]).to_dict()
    settings = [tuple(point["setting"].values()) for point in found["points"]]
    assert settings == [(0, "kept"), (1, "kept"), (3, "kept"), (1, "refit"), (3, "refit")]
    assert found["points"][0]["scores"] == score(quantized, batches)
    assert len({point["scores"]["loss"] for point in found["points"]}) == 5
    json.dumps(found)


def test_learned_bits_and_missing_batches_are_refused(quantized) -> None:
    model = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), Config())
    with (
        pytest.raises(OrderError, match=r"0\.weight: expected a trained model with frozen bits"),
        lowered_bits(model, 1),
    ):
        pass
    with pytest.raises(OrderError, match="expected batches to fit"), lowered_bits(quantized, 1, boundaries="refit"):
        pass
