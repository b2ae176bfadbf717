"""Experiments on deployed files: what they record, and what the pages make of it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.export import page, records
from nipq.prepare.layer_table import quantizers

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
    options = argparse.Namespace(overwrite=False, timeout=None)
    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    records.write(kept, {"name": "kept"})
    failed = records.each("experiments.export.no_such_script", [(kept, []), (new, [])], "COMMAND", options)
    assert failed == 1
    assert json.loads(kept.read_text("utf-8")) == {"name": "kept"}
    found = json.loads(new.read_text("utf-8"))
    assert "No module named experiments.export.no_such_script" in found["error"]
    assert found["command"] == "COMMAND"
    assert found["machine"].keys() == {"processor", "cores", "load"}
    assert not list(tmp_path.glob("*.tmp"))


def test_errors_lose_their_paths() -> None:
    assert (
        records.short(ValueError("no /tmp/some/where/model.onnx\n  in 1/2 s")) == "ValueError: no model.onnx in 1/2 s"
    )


def test_a_failure_is_shown_with_its_reason(results: Path) -> None:
    sound = [rung("E0 static"), rung("E1 layers", **LAYERS)]
    records.write(results / "zoo" / "a.json", zoo_record("a", rungs=sound))
    records.write(results / "zoo" / "b.json", zoo_record("timm/b", error="ConfigError: cannot be traced"))
    fault = [rung("E0 static", passed=False), rung("E1 layers", **LAYERS)]
    records.write(results / "zoo" / "c.json", zoo_record("c", rungs=fault))
    stopped = [rung("E0 static"), rung("E1 layers", passed=False)]
    records.write(results / "zoo" / "d.json", zoo_record("d", rungs=stopped))
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
        records.write(results / "trained" / "digits" / f"run{number}.json", record)
    text = page.trained()
    assert "| digits | OpenVINO |  |  | 2 of 2 |  |" in text
    assert "| digits | `torch.export` program |  |  |  | 1 of 2 |" in text
    assert "digits, run1, `torch.export` program, E3 exact: stem: E3 exact differs" in text
    assert "in 1 of 2 runs, for instance run1: stem: scale: 1 of 4 differ" in text
    assert "| ONNX Runtime, default session | 1.0e-01 | 1.0e-02 | 89.00 % |" in page.runtimes()


def test_a_packed_file_is_held_against_what_it_needs(results: Path) -> None:
    for name, payload, header in (("digits", 1000.0, 200), ("resnet18", 100_000.0, 200)):
        total = int(payload) + 100 + header
        facts = {"payload": payload, "scales": 100, "header": header, "promised": total, "float32": 8, "layers": 4}
        record = zoo_record(name, files={"packed file": total, "ONNX": 7}) | facts
        records.write(results / "sizes" / f"{name}.json", record)
    text = page.sizes()
    assert "| packed file above what it needs | 18.2 % | 0.2 % |" in text
    assert "for ResNet-18, random bits, not for trained model of the digits" in text
    assert "50 to 50 bytes a layer" in text


def test_speeds_are_shown_against_the_runtime_s_own_float(results: Path) -> None:
    rows = {
        "OpenVINO float": {"milliseconds": [9.0, 10.0, 11.0], "speed": [1.0, 1.0, 1.0]},
        "OpenVINO w8a8": {"milliseconds": [4.0, 5.0, 6.0], "speed": [1.9, 2.0, 2.1]},
    }
    kernels = {"w8a8": {"layers": 21, "integer": 18, "expected": 18, "float": []}}
    facts = {"runtime": "openvino", "threads": 1, "rounds": 3, "rows": rows, "kernels": kernels, "load_before": 0.2}
    records.write(results / "latency" / "a.json", zoo_record("resnet18", **facts))
    text = page.latency("openvino")
    assert "| resnet18, 1 thread: OpenVINO float | 10.0 (9.0 to 11.0) |  |" in text
    assert "| resnet18, 1 thread: OpenVINO w8a8 | 5.0 (4.0 to 6.0) | 2.00 (1.90 to 2.10) |" in text
    assert "resnet18 w8a8: 18 of 21" in text
    assert page.latency("inductor") == page.NOTHING


def test_without_results_the_pages_say_so(results: Path) -> None:
    assert all(page.NOTHING in text for text in page.pages().values())


def test_committed_results_say_where_they_come_from_and_name_no_path() -> None:
    for record in records.read_all(records.RESULTS):
        assert {"name", "machine", "versions", "command"} <= record.keys()
        assert not records.PATH.search(re.sub(r"RUNS/[\w.+-]+", "", record["command"]))


def test_random_networks_are_the_same_for_the_same_seed() -> None:
    nets = pytest.importorskip("experiments.export.random_nets")

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 200, 3), nn.BatchNorm2d(200), nn.ReLU(), nn.Conv2d(200, 4, 3))
        x = torch.randn(2, 3, 8, 8)
        return nets.quantized(nets.shaken_(model, x), x, 3)

    first, second = made(), made()
    bits = [[quantizer.bits_rounded for quantizer in quantizers(model)] for model in (first, second)]
    assert bits[0] == bits[1]
    assert len(set(bits[0])) > 1
    gains = first[1].weight
    assert 0 < int((gains < 0).sum()) < len(gains)
    assert torch.equal(gains, second[1].weight)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    fixed = nets.quantized(plain, torch.randn(2, 3, 8, 8), 0, bits=8)
    assert {quantizer.bits_rounded for quantizer in quantizers(fixed)} == {8}


def test_calls_take_turns() -> None:
    pytest.importorskip("onnxruntime")
    latency = pytest.importorskip("experiments.export.latency")
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = latency.interleaved(calls, 4, lambda: float(len(order)))
    assert samples == {name: [1.0] * 4 for name in "abc"}
    assert order[::2] == order[1::2]  # once to warm up, once timed
    rounds = [order[start : start + 6 : 2] for start in range(0, len(order), 6)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert latency.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert latency.own_float("ONNX Runtime default mixed") == "ONNX Runtime float"


def test_a_model_is_no_distance_from_itself() -> None:
    pytest.importorskip("onnxruntime")
    trained = pytest.importorskip("experiments.export.trained")
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    batches = [(torch.randn(3, 4), None), (torch.randn(2, 4), None)]

    def metric(module: nn.Module, loader: Any) -> float:
        return float(module is model)

    found = trained.differences(model, {"same": model, "other": other}, batches, metric)
    assert found["same"] == {"largest": 0.0, "mean": 0.0, "metric": 1.0}
    assert found["other"]["largest"] > found["other"]["mean"] > 0
