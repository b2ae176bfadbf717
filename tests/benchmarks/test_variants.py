from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.many_quantizers import OWN_STEP, growth, overhead, own_parts, per_quantizer
from benchmarks.memory import saved_bytes
from benchmarks.networks import NETWORKS, Encoder, Network
from benchmarks.training_step import measure, trainings
from benchmarks.variants import EMPIRICAL, FLOAT, UNIFORM, VARIANTS, Training, prepared
from nipq.prepare.layer_table import quantizers

SMALL = Network(lambda: Encoder(layers=1, width=24), (4, 24), 2, ("contiguous",), "small encoder")
OPTIONAL = {"Brevitas": "brevitas", "DiffQ, weights only": "diffq"}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in OPTIONAL])
def test_a_variant_trains(variant: str) -> None:
    training = prepared(variant, SMALL, "contiguous")
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.step()
    training.step()
    assert training.loss().isfinite()
    assert any((a != b).any() for a, b in zip(before, training.model.parameters(), strict=True))


@pytest.mark.parametrize("variant", OPTIONAL)
@pytest.mark.filterwarnings("ignore")  # of their own
def test_a_peer_trains(variant: str) -> None:
    pytest.importorskip(OPTIONAL[variant])
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


def test_overhead_is_what_a_search_adds_to_a_float_step() -> None:
    parts = {"float forward + backward": [1.0, 2.0], "optimizer.step": [9.0, 9.0]}
    assert overhead({part: [2.0, 3.0] for part in OWN_STEP} | parts) == [5.0, 7.0]


def test_growth_is_one_when_each_quantizer_costs_the_same() -> None:
    costs = per_quantizer({10: {"a": [1.0]}, 200: {"a": [20.0]}, 2000: {"a": [400.0]}})["a"]
    assert costs["10"][1] == pytest.approx(1e5)
    assert growth(costs) == 2
    assert growth({"10": costs["10"]}) == 1


def test_a_peer_that_fails_is_said_and_tried_in_the_other_format(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_in_channels_last(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
        if inputs.is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError("no such format\nand details")
        return VARIANTS[FLOAT](model, inputs, labels)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 1000))

    monkeypatch.setitem(VARIANTS, "Brevitas", fails_in_channels_last)
    network = Network(build, (3, 8, 8), 2, ("contiguous", "channels_last"), "images")
    found, notes = trainings(network, [FLOAT, "Brevitas"], "channels_last")
    assert set(found) == {(FLOAT, "channels_last"), (FLOAT, "contiguous"), ("Brevitas", "contiguous")}
    assert notes == ["Brevitas, channels_last: no such format"]
    assert "no such format" in capsys.readouterr().out
