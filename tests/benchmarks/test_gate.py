from __future__ import annotations

import pytest

from benchmarks import gate
from benchmarks.gate import Check


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "available", lambda: True)


def test_a_ratio_above_its_limit_fails_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main((Check("kept", 2.0, lambda: 1.5), Check("broken", 2.0, lambda: 2.5))) == 1
    printed = capsys.readouterr()
    assert "kept: 1.50 (limit 2)" in printed.out
    assert printed.err.startswith("broken: expected at most 2, found 2.50. Look at what changed in")
    assert "kept" not in printed.err


def test_one_disturbed_measurement_is_forgiven() -> None:
    measured = iter([9.0, 1.0])
    assert gate.main((Check("disturbed", 2.0, lambda: next(measured)),)) == 0


def test_without_kernels_there_is_nothing_to_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "available", lambda: False)
    assert gate.main((Check("broken", 2.0, lambda: 2.5),)) == 0
    assert "skipped" in capsys.readouterr().out
