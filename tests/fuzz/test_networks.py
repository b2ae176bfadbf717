"""Random networks end right, or are refused before training; none is silently wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from nipq.nn import deployed
from tests.fuzz.networks import network
from tests.fuzz.oracle import outcome

#: Seeds of the default run, and of the slow one.
FEW, MANY = range(30), range(30, 330)
#: Networks that once ended wrong, and why.
ONCE_WRONG = {
    45: "a layer that is also kept in a dict stayed out of the ONNX file",
    138: "half precision: batch norms enlarge what sums are rounded by",
    200: "half precision: a packed file held a bias that it did not read back",
    245: "an ONNX file that no runtime could run",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", FEW)
def test_a_network_ends_right_or_is_refused(seed: int) -> None:
    given = network(seed)
    found = outcome(given)
    assert found.verdict != "fault", f"{found.stage}: {found.reason}\n{given}"


@pytest.mark.parametrize("seed", ONCE_WRONG)
def test_what_once_ended_wrong_does_not_again(seed: int) -> None:
    given = network(seed)
    found = outcome(given, export=True)
    assert found.verdict != "fault", f"{found.stage}: {found.reason}\n{given}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_many_networks_end_right_or_are_refused(seed: int) -> None:
    given = network(seed)
    found = outcome(given, export=seed % 5 == 0)
    assert found.verdict != "fault", f"{found.stage}: {found.reason}\n{given}"


def test_refusal_is_no_way_out() -> None:
    """Most networks have nothing that must be refused: the rehearsal and the probe let them pass."""
    verdicts = Counter(outcome(network(seed)).verdict for seed in range(1000, 1012))
    assert verdicts["right"] >= 8  # chance leaves fewer than 60 of 100 right in one run of 1,000


# ---------------------------------------------------------------------- the oracle can fail


def scale_off(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = deployed.DeployedLayer.forward
    monkeypatch.setattr(deployed.DeployedLayer, "forward", lambda *args, **kwargs: 1.001 * forward(*args, **kwargs))


def layer_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(deployed.run_operation(self.layer, x, self.used_weight.to(x.dtype), None))

    monkeypatch.setattr(deployed.DeployedLayer, "forward", forward)


@pytest.mark.parametrize("plant", [scale_off, layer_left_out])
def test_what_is_planted_is_found_by_the_rehearsal_and_without_it(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = network(3)
    assert outcome(given).verdict == "right"
    plant(monkeypatch)
    assert outcome(given).verdict == "refused"
    monkeypatch.setattr("nipq.prepare.prepare.rehearse", lambda *_args: None)
    assert outcome(given).verdict == "fault"
