"""A whole run: what it leaves, what it promises, and how it stops."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nipq.errors import BudgetError, ConfigError, FileFormatError, NonFiniteError
from nipq.train import pipeline
from nipq.train.checkpoint import Checkpoint
from nipq.train.config import TrainConfig
from nipq.train.pipeline import run, verify_run
from nipq.train.run_folder import RunFolder
from nipq.train.trainer import Trainer

Make = Callable[..., TrainConfig]


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_run_leaves_everything(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoint.pt", "trained.pt", "float.pt", "layers.csv",
        "layers.json", "model.nipq.safetensors", "verify.json", "results.json", "plots/bits_per_layer.png",
        "plots/history.png", "plots/ranges.png",
    }  # fmt: skip
    assert expected <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


def test_results_say_what_happened(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert list(results["states"]) == ["float", "frozen", "bn", "finetuned"]
    assert all(0 <= scores["test"]["accuracy"] <= 100 for scores in results["states"].values())
    assert results["states"]["finetuned"]["test"]["accuracy"] > 40  # chance is 10
    assert results["average_bits"]["weights"] <= 4
    assert results["average_bits"]["activations"] <= 4
    assert results["bytes"]["file"] == (finished / "model.nipq.safetensors").stat().st_size
    assert results["verified"] is True


def test_layers_are_listed_in_both_forms(finished: Path) -> None:
    layers = json.loads((finished / "layers.json").read_text(encoding="utf-8"))
    with (finished / "layers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in layers]
    assert [int(row["weight_bits"]) for row in rows] == [layer["weight_bits"] for layer in layers]
    assert sum(r["weight_bits"] * r["weight_count"] for r in layers) <= 4 * sum(r["weight_count"] for r in layers)


def test_metrics_have_a_row_for_each_epoch_with_every_layer(finished: Path) -> None:
    rows = RunFolder(finished).rows()
    lengths = {"float": 4, "search": 3, "finetune": 1}
    expected = [(stage, epoch + 1) for stage, count in lengths.items() for epoch in range(count)]
    assert [(row["stage"], row["epoch"]) for row in rows] == expected
    layers = json.loads((finished / "layers.json").read_text(encoding="utf-8"))
    assert all(set(row["layer_bits"]) == {layer["name"] for layer in layers} for row in rows[4:])
    assert rows[-1]["step"] == 8 * 16


def test_trained_model_is_what_the_results_score(finished: Path) -> None:
    assert bool(verify_run(RunFolder(finished)))


def test_float_weights_start_another_run(finished: Path, make_config: Make, tmp_path: Path) -> None:
    model = {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 8}, "weights": str(finished / "float.pt")}
    trainer = Trainer(make_config(model=model))
    old = json.loads((finished / "results.json").read_text(encoding="utf-8"))["states"]["float"]["test"]
    assert trainer.task.scores(trainer.model, trainer.data.test) == old


def test_finished_run_is_given_again_and_not_overwritten(
    finished: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="already holds a run"):
        run(make_config(), finished, quiet=True)
    monkeypatch.setattr(pipeline, "Trainer", None)  # a finished run must not train again
    assert run(make_config(), finished, resume=True, quiet=True) == results


def test_resume_under_another_config_is_refused(finished: Path, make_config: Make) -> None:
    with pytest.raises(ConfigError, match="seed differ"):
        run(make_config(seed=5), finished, resume=True, quiet=True)


def test_same_seed_same_numbers(finished: Path, make_config: Make, tmp_path: Path) -> None:
    again = run(make_config(), tmp_path / "again", quiet=True)
    first = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert without_time(again) == without_time(first)


def test_damaged_checkpoint_stops_a_resume(make_config: Make, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(make_config())
    place.checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(FileFormatError, match="its checksum is missing or another one"):
        run(make_config(), place.path, resume=True, quiet=True)
    assert place.checkpoint.read_bytes() == b"not a checkpoint"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": {"average_bits": {"weights": 1.5}}}, BudgetError, "average weight bits within 2 to 8"),
        ({"budget": {"model_size": 10}}, BudgetError, "model size within"),
        ({"budget": {"model_size": "a lot"}}, ConfigError, "a lot"),
        ({"model": {"factory": "resnet18"}}, ConfigError, r"cannot take inputs of shape \(1, 1, 8, 8\)"),
        (
            {"model": {"factory": "nipq.train.models:digits_net", "kwargs": {"classes": 4}}},
            ConfigError,
            r"\(1, 10\) logits for 10 classes, found \(1, 4\)",
        ),
        ({"data": {"kind": "fashion_mnist"}}, ConfigError, "dataset-fashion-mnist"),
        ({"quantization": {"rules": [{"pattern": "absent*", "quantize": False}]}}, ConfigError, r"absent\*"),
    ],
    ids=["average_bits", "size", "size_text", "shape", "classes", "data", "rule"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(make_config(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(make_config: Make, tmp_path: Path) -> None:
    config = make_config(optimizer={"lr": 1e3, "warmup_epochs": 0, "momentum": 0.0}, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"stage float, epoch \d, step \d.*(in|of) \w+.*--resume"):
        run(config, tmp_path / "run", quiet=True)
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values() if tensor.is_floating_point())


def test_fixed_bits_need_no_budget(make_config: Make, tmp_path: Path) -> None:
    stages = {"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    config = make_config(budget=None, stages=stages, quantization={"weight_bits": 3, "activation_bits": 5})
    results = run(config, tmp_path / "run", quiet=True)
    assert results["average_bits"] == {"weights": 3, "activations": 5}
    assert list(results["states"]) == ["float", "frozen", "bn"]
    assert results["verified"] is True


def test_weights_alone(make_config: Make, tmp_path: Path) -> None:
    """As DiffQ was published; no input has a quantizer, in the pictures neither."""
    config = make_config(method="diffq-weights", budget={"average_bits": {"weights": 4}})
    results = run(config, tmp_path / "run", quiet=True)
    assert results["verified"]
    assert results["average_bits"]["weights"] <= 4
    assert (tmp_path / "run" / "plots" / "ranges.png").is_file()


def test_everything_switched_on(make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        stages={"float": {"epochs": 1}, "search": {"epochs": 2}, "finetune": {"epochs": 1}},
        optimizer={
            "name": "adamw",
            "lr": 0.003,
            "quantizer_optimizer": "adam",
            "schedule": "spanning",
            "step": "epoch",
        },
        budget={"average_bits": {"weights": 5}, "model_size": "8 kB", "bit_ops": "60 M"},
        penalty="paper",
        teacher={"factory": "nipq.train.models:digits_net", "weights": None, "weight": 0.1, "temperature": 2.0},
        quantization={"weight_bits": {"allowed": [2, 4, 8]}, "noise": "empirical"},
        ema_decay=0.9,
        label_smoothing=0.1,
        amp="bf16",
        channels_last=True,
    )
    results = run(config, tmp_path / "run", quiet=True)
    assert all(limit["rounded"] <= limit["target"] for limit in results["limits"])
    assert results["verified"] is True


def test_device_that_is_not_there(make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device, found none"):
        run(make_config(device="cuda"), tmp_path / "run", quiet=True)
