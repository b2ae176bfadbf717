"""Every method that is timed makes a training step of its own."""

from __future__ import annotations

import pytest
from torch import nn

import nipq
from benchmarks import methods
from nipq.train.config import METHODS


@pytest.mark.parametrize("word", [methods.FLOAT, *METHODS])
def test_a_method_trains(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    build = methods.build_model
    monkeypatch.setattr(methods, "BATCH", 4)
    monkeypatch.setattr(methods, "build_model", lambda config: built.append(build(config)) or built[0])
    training = methods.training(word)
    before = [parameter.detach().clone() for parameter in built[0].parameters()]
    training.step()
    training.step()
    changed = [bool((a != b).any()) for a, b in zip(before, built[0].parameters(), strict=True)]
    assert any(changed)
    if word != methods.FLOAT:
        table = nipq.prepare.layer_table.layer_table(built[0])
        assert {row.input is None for row in table} == {word == "diffq-weights"}
