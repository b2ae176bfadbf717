"""A task that is no classification, on data of its own, through a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.cli.show import results_table
from nipq.errors import ConfigError
from nipq.train.batches import Batch, Sources, tensor_splits
from nipq.train.config import DataConfig, TrainConfig, check_config
from nipq.train.factory import build_task
from nipq.train.pipeline import run, verify_run
from nipq.train.run_folder import RunFolder
from nipq.train.task import Task, predictions

BASE: dict[str, Any] = {
    "task": f"{__name__}:make_task",
    "model": {"factory": f"{__name__}:Plane"},
    "data": {"kind": "custom", "factory": f"{__name__}:points", "batch_size": 64, "kwargs": {"noise": 0.05}},
    "budget": {"average_bits": {"weights": 6, "activations": 6}},
    "stages": {"float": {"epochs": 8}, "search": {"epochs": 4}, "finetune": {"epochs": 1, "lr": 0.01}},
    "optimizer": {"lr": 0.05},
    "calibration_batches": 2,
    "device": "cpu",
    "threads": 1,
    "channels_last": True,  # means nothing to tensors without four axes
}


class Plane(nn.Module):
    """Takes keyword inputs and returns a mapping, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"height": self.layers(torch.stack([x, y], -1))}


class Heights(Task):
    metric = "error"
    unit = "m"
    higher_is_better = False

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return (outputs["height"][:, 0] - targets["height"]).square().mean()

    def distillation(self, outputs: dict[str, Tensor], teacher_outputs: dict[str, Tensor]) -> Tensor:
        return (outputs["height"] - teacher_outputs["height"]).square().mean()

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        squares = torch.cat([(o["height"][:, 0] - t["height"]).square() for o, t in predictions(model, batches)])
        return {"loss": float(squares.mean()), "error": float(squares.mean().sqrt())}


class Learner(Heights):
    """From the teacher alone."""

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return outputs["height"].new_zeros(())


def make_task(config: TrainConfig) -> Task:
    return Learner() if config.teacher is not None else Heights()


def points(config: DataConfig, seed: int) -> Sources:
    torch.manual_seed(0)

    def draw(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x, y = torch.rand(2, count) * 2 - 1
        noise = config.kwargs["noise"] * torch.randn(count)
        return {"x": x, "y": y}, {"height": x - 2 * y.abs() + noise}

    return tensor_splits(draw(1000), draw(300), config, seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regression") / "run"
    run(check_config(BASE), folder, quiet=True)
    return folder


def test_regression_is_learned_quantized_and_verified(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["metric"] == {"name": "error", "unit": "m", "higher_is_better": False}
    assert list(results["states"]) == ["float", "frozen", "finetuned"]
    for scores in results["states"].values():
        assert scores["test"]["error"] == pytest.approx(scores["test"]["loss"] ** 0.5)
        assert scores["test"]["error"] < 0.3  # the heights' own deviation is 0.8
    assert results["verified"] is True
    numbers = json.loads((finished / "verify.json").read_text(encoding="utf-8"))
    assert "metric_trained" in json.dumps(numbers)


def test_rows_and_pictures_name_the_metric(finished: Path) -> None:
    rows = RunFolder(finished).rows()
    assert all("val_error" in row and "train_loss" in row for row in rows)
    assert not any("accuracy" in key for row in rows for key in row)
    assert not any(key == "train_error" for row in rows for key in row)  # a root is no mean over samples
    assert (finished / "plots" / "history.png").is_file()


def test_results_are_printed_with_their_unit(finished: Path) -> None:
    table = results_table(json.loads((finished / "results.json").read_text(encoding="utf-8")), title="run")
    first, second = table.rows[0]
    assert first == "test error, float"
    assert second.split(" (")[0].endswith(" m")


def test_finished_run_is_verified_again_with_its_task(finished: Path) -> None:
    assert bool(verify_run(RunFolder(finished)))


def test_teacher_alone_is_enough(finished: Path, tmp_path: Path) -> None:
    teacher = {"factory": f"{__name__}:Plane", "weights": str(finished / "float.pt")}
    stages = {"float": {"epochs": 4}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    results = run(check_config({**BASE, "teacher": teacher, "stages": stages}), tmp_path / "run", quiet=True)
    assert results["states"]["float"]["test"]["error"] < 0.3
    assert results["verified"] is True


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("regression", "no task 'regression'"),
        ("nipq.train.task:absent", "no task 'nipq.train.task:absent'"),
        ("builtins:type", "must return a Task, it gave"),
    ],
)
def test_task_that_is_none(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(check_config({**BASE, "task": task}))


def test_model_that_does_not_take_the_inputs_is_refused(tmp_path: Path) -> None:
    model = {"factory": "nipq.train.models:digits_net"}
    with pytest.raises(ConfigError, match=r"cannot take inputs of shape \{'x': \(1,\), 'y': \(1,\)\}"):
        run(check_config({**BASE, "model": model}), tmp_path / "run", quiet=True)


def test_predictions_run_where_a_model_of_buffers_alone_is_and_give_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Dropout()).to("meta")
    model[0].eval()
    [(outputs, targets)] = predictions(model, [(torch.zeros(3, 2), torch.zeros(3))])
    assert outputs.device.type == targets.device.type == "meta"
    assert [module.training for module in model.modules()] == [True, False, True]
