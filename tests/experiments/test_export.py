"""Experiments on deployed files: what they record, and what the pages make of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from experiments.export import page, records

ORIGIN = {
    "machine": {"processor": "P", "cores": 2, "load": 0.1},
    "versions": {"nipq": "1"},
    "command": "python -m experiments.export.zoo a",
    "seconds": 1.0,
}
LAYERS = {"codes": 1000, "wrong": 0, "flips": 3, "worst_output": 2e-7, "layers_at_fault": 0}


def rung(name: str, passed: bool = True, artifact: str = "model.onnx", **numbers: Any) -> dict[str, Any]:
    difference = None if passed else f"stem: {name} differs"
    return {"name": name, "artifact": artifact, "passed": passed, "numbers": numbers, "first_difference": difference}


def zoo_record(name: str, **others: Any) -> dict[str, Any]:
    return {"name": name, "size": 64, "layers": 5, "seed": 0, **others} | ORIGIN


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    return tmp_path


def test_an_item_is_measured_once_and_its_failure_is_recorded(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "found.jsonl", overwrite=False, timeout=None)
    records.write(options.out, "kept", {"name": "kept"})
    items = [("kept", []), ("digits/new", [])]
    assert records.each("experiments.export.no_such_script", items, "COMMAND", options) == 1
    kept, found = records.stored(options.out).read().values()
    assert kept == {"item": "kept", "name": "kept"}
    assert (found["item"], found["name"]) == ("digits/new", "new")
    assert "No module named experiments.export.no_such_script" in found["error"]
    assert found["command"] == "COMMAND"
    assert found["machine"].keys() == {"processor", "cores", "load"}


def test_errors_lose_their_paths() -> None:
    assert (
        records.short(ValueError("no /tmp/some/where/model.onnx\n  in 1/2 s")) == "ValueError: no model.onnx in 1/2 s"
    )


def test_a_failure_is_shown_with_its_reason(results: Path) -> None:
    sound = [rung("E0 static"), rung("E1 layers", **LAYERS)]
    records.write(results / "zoo.jsonl", "a", zoo_record("a", rungs=sound))
    records.write(results / "zoo.jsonl", "b", zoo_record("timm/b", error="ConfigError: cannot be traced"))
    fault = [rung("E0 static", passed=False), rung("E1 layers", **LAYERS)]
    records.write(results / "zoo.jsonl", "c", zoo_record("c", rungs=fault))
    stopped = [rung("E0 static"), rung("E1 layers", passed=False)]
    records.write(results / "zoo.jsonl", "d", zoo_record("d", rungs=stopped))
    text = page.zoo()
    assert "hold for 1 of 4 networks" in text
    assert "| d (torchvision) | 64 | 5 | holds | **fails** |  |  |  |" in text
    assert "| a (torchvision) | 64 | 5 | holds | holds | 1,000 | 3 | 2.0e-07 |" in text
    assert "| c (torchvision) | 64 | 5 | **fails** | holds |" in text
    assert "Not measured yet: alexnet, " in text
    assert "- b: ConfigError: cannot be traced\n- c: stem: E0 static differs\n- d: stem: E1" in text


def test_trained_runs_are_counted_by_rung(results: Path) -> None:
    differences = {"deployed": {"metric": 90.0}, "default": {"largest": 0.1, "mean": 0.01, "metric": 89.0}}
    for number, holds in enumerate((True, False)):
        own = {"passed": holds, "first_difference": None if holds else "file: stem: scale: 1 of 4 differ"}
        rungs = [rung("E2 noise", artifact="OpenVINO"), rung("E3 exact", holds, "model.pt2")]
        facts = {"group": "digits", "own_file": own, "rungs": rungs, "samples": 8, "task": {"unit": "%"}}
        record = zoo_record(f"run{number}", differences=differences, **facts)
        records.write(results / "trained.jsonl", f"digits/run{number}", record)
    text = page.trained()
    assert "| digits | OpenVINO |  |  | 2 of 2 |  |" in text
    assert "| digits | `torch.export` program |  |  |  | 1 of 2 |" in text
    assert "digits, run1, `torch.export` program, E3 exact: stem: E3 exact differs" in text
    assert "in 1 of 2 runs, for instance run1: stem: scale: 1 of 4 differ" in text
    assert "| ONNX Runtime, default session | 1.0e-01 | 1.0e-02 | 89.00 % |" in page.runtimes()
