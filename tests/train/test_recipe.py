"""The published recipe runs as it is written on an image folder, without a connection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

from nipq.cli import app
from nipq.train.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ["mobilenet_v2_imagenet_4bit", "mobilenet_v2_imagenet_5.3gbops"]


def make_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = root / split / name / f"{i}.jpeg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)


def make_weights(cache: Path) -> None:
    """Random weights under the names of torchvision's published ones."""
    (cache / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("mobilenet_v2", "efficientnet_b0"):
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        state = torchvision.models.get_model(name).state_dict()
        torch.save(state, cache / "hub" / "checkpoints" / url.rsplit("/", 1)[1])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_was_published(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.stages.search.epochs, config.stages.finetune.epochs, config.data.batch_size) == (40, 3, 256)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.momentum) == (0.04, 1e-5, 0.9)
    assert (config.optimizer.schedule, config.optimizer.step, config.optimizer.final) == ("spanning", "epoch", 0.001)
    assert (config.quantization.init, config.quantization.noise, config.quantization.input_bits) == (
        "release",
        "empirical",
        None,
    )
    assert config.quantization.weight_bits == config.quantization.activation_bits
    assert (config.quantization.weight_bits.min, config.quantization.weight_bits.max) == (2, 14)
    assert (config.quantization.weight_bits.start, config.penalty) == (8, "paper")
    assert config.teacher is not None
    assert (config.teacher.factory, config.teacher.weight, config.teacher.temperature) == ("efficientnet_b0", 1.0, 1.0)


def test_the_two_recipes_differ_in_the_budget_only() -> None:
    first, second = (load_config(CONFIGS / f"{name}.yaml") for name in RECIPES)
    assert first.budget != second.budget
    assert first.model_copy(update={"budget": None}) == second.model_copy(update={"budget": None})


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_unchanged_on_a_tiny_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images")
    make_weights(tmp_path / "cache")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    arguments = ["train", f"{CONFIGS / name}.yaml", "--run", f"{tmp_path / 'run'}", "--data", f"{tmp_path / 'images'}"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    answer = json.loads(result.output)
    assert result.exit_code == 0, answer
    assert list(answer["states"]) == ["float", "frozen", "bn", "finetuned"]
    assert all(limit["rounded"] <= limit["target"] for limit in answer["limits"])
    assert answer["steps"] == 43
