"""Killed at any moment, a run ends with the numbers of one that was never stopped."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nipq.errors import ConfigError
from nipq.prepare.layer_table import layer_table
from nipq.train.config import TrainConfig, load_config
from nipq.train.pipeline import run
from nipq.train.trainer import Trainer

SETTINGS = """
model: {factory: "nipq.train.models:digits_net", kwargs: {width: 8}}
data: {kind: digits, batch_size: 32, train_limit: 256}
budget: {average_bits: {weights: 4, activations: 4}}
stages: {float: {epochs: 2}, search: {epochs: 3}, finetune: {epochs: 2}}
optimizer: {lr: 0.03, schedule: spanning, bits_lr: 0.1}
ema_decay: 0.9
batchnorm_batches: 2
calibration_batches: 2
device: cpu
threads: 1
checkpoint_every: 3
"""

KILLED_AT = """
import os, signal, sys
from nipq.train import checkpoint, load_config, run

saves, save = [], checkpoint.Checkpoint.save

def counted(self, path):
    saves.append(path)
    if len(saves) == {count}:
        if {half}:
            path.with_name(path.name + ".tmp").write_bytes(b"half of a checkpo")
        else:
            save(self, path)
        os.kill(os.getpid(), signal.SIGKILL)
    if len(saves) == {wait_at}:
        signal.pause()
    save(self, path)

checkpoint.Checkpoint.save = counted
run(load_config(sys.argv[1]), sys.argv[2], resume=True, quiet=True)
"""


def start(
    config: Path, folder: Path, *, count: int = 0, half: bool = False, wait_at: int = 0
) -> subprocess.Popen[bytes]:
    code = KILLED_AT.format(count=count, half=half, wait_at=wait_at)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen([sys.executable, "-c", code, str(config), str(folder)], env=environment)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.distributed
def test_kill_and_resume_gives_the_same_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    config = load_config(path)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expected = run(config, straight, quiet=True)

    # Killed in the float stage within an epoch, then in the search while a checkpoint is half written.
    for count, half in ((5, False), (7, True)):
        process = start(path, broken, count=count, half=half)
        assert process.wait() == -signal.SIGKILL
    assert not (broken / "results.json").exists()

    # Killed from outside, whenever that happens to be; it waits for that before its last epochs.
    before = len(rows(broken))
    process = start(path, broken, wait_at=8)
    while len(rows(broken)) <= before and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    results = run(config, broken, resume=True, quiet=True)
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}
    assert rows(broken) == rows(straight)
    assert (broken / "layers.json").read_text() == (straight / "layers.json").read_text()
    assert (broken / "model.nipq.safetensors").read_bytes() == (straight / "model.nipq.safetensors").read_bytes()


def test_resume_of_nothing_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS.replace("search: {epochs: 3}", "search: {epochs: 1}"), encoding="utf-8")
    (tmp_path / "run").mkdir()
    assert run(load_config(path), tmp_path / "run", resume=True, quiet=True)["verified"] is True


def test_a_layer_that_was_float_is_not_continued_as_a_quantized_one(
    make_config: Callable[..., TrainConfig], until: Callable[[Trainer, str], Trainer]
) -> None:
    stages = {"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 1, "lr": 0.01}}
    config = make_config(stages=stages, data={"kind": "digits", "batch_size": 32, "train_limit": 64})
    checkpoint = copy.deepcopy(until(Trainer(config), "search").checkpoint())
    assert Trainer(config, copy.deepcopy(checkpoint)).progress.stage == "search"
    frozen = until(Trainer(config, copy.deepcopy(checkpoint)), "finetune").checkpoint()
    assert Trainer(config, copy.deepcopy(frozen)).progress.stage == "finetune"
    name = layer_table(Trainer(config, copy.deepcopy(checkpoint)).model)[-1].name
    checkpoint.model[f"{name}.weight"] = checkpoint.model[f"{name}.parametrizations.weight.original"]
    for key in list(checkpoint.model):
        if key.startswith((f"{name}.parametrizations.", f"{name}.quantization.")):
            del checkpoint.model[key]
    with pytest.raises(ConfigError, match=rf"found {name}\.weight in the checkpoint alone; use the run's own"):
        Trainer(config, checkpoint)
