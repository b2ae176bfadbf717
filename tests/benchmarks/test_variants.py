from __future__ import annotations

import pytest
import torch

from benchmarks.many_quantizers import growth, own_parts, per_quantizer
from benchmarks.memory import saved_bytes
from benchmarks.networks import NETWORKS, Encoder, Network
from benchmarks.training_step import measure
from benchmarks.variants import EMPIRICAL, FLOAT, UNIFORM, VARIANTS, prepared
from nipq.layer_table import quantizers

SMALL = Network(lambda: Encoder(layers=1, width=24), (4, 24), 2, ("contiguous",), "small encoder")
PEERS = {"Brevitas": "brevitas", "DiffQ, weights only": "diffq"}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in PEERS])
def test_a_variant_trains(variant: str) -> None:
    training = prepared(variant, SMALL, "contiguous")
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.step()
    training.step()
    assert training.loss().isfinite()
    assert any((a != b).any() for a, b in zip(before, training.model.parameters(), strict=True))


@pytest.mark.parametrize("variant", PEERS)
@pytest.mark.filterwarnings("ignore")  # of their own
def test_a_peer_trains(variant: str) -> None:
    pytest.importorskip(PEERS[variant])
    training = prepared(variant, SMALL, "contiguous")
    training.step()
    assert training.loss().isfinite()


def test_variants_start_from_the_same_weights_and_data() -> None:
    one, other = (prepared(variant, SMALL, "contiguous") for variant in (FLOAT, UNIFORM))
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.model.head.weight, other.model.head.parametrizations.weight.original)


def test_convolutional_networks_are_built_in_both_formats() -> None:
    pytest.importorskip("torchvision")
    network = NETWORKS["mobilenet_v2"]._replace(batch=2, shape=(3, 32, 32))
    training = prepared(UNIFORM, network, "channels_last")
    assert training.inputs.is_contiguous(memory_format=torch.channels_last)
    assert len(quantizers(training.model)) == 2 * 53
    assert saved_bytes(training.loss, training.model.parameters()) > 0


def test_a_small_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    found = measure("small", [FLOAT, UNIFORM, EMPIRICAL], rounds=2, threads=[1])
    rows = found["threads"]["1"]
    assert rows[FLOAT]["contiguous"]["ratio"] == [1, 1, 1]
    assert rows[UNIFORM]["contiguous"]["milliseconds"][1] > 0
    assert found["memory"][f"{UNIFORM} | contiguous"]["saved"] > 0


def test_parts_of_a_step_with_many_quantizers_run() -> None:
    for part in own_parts(3, torch.randn(4, 8)).values():
        part()


def test_growth_is_one_when_each_quantizer_costs_the_same() -> None:
    costs = per_quantizer({10: {"a": [1.0]}, 200: {"a": [20.0]}, 2000: {"a": [400.0]}})["a"]
    assert costs["10"][1] == pytest.approx(1e5)
    assert growth(costs) == 2
    assert growth({"10": costs["10"]}) == 1
