"""``nipq train`` under the launchers, and the group and device that it takes from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nipq.errors import ConfigError, DistributedError
from nipq.train import parallel
from nipq.train.config import check_config
from nipq.train.parallel import _has_cuda, accelerated, explained, is_first, is_launched
from tests.distributed.ranks import ROOT
from tests.distributed.runs import SETTINGS

CONFIG = """
model: {factory: "nipq.train.models:digits_net", kwargs: {width: 4}}
data: {kind: digits, batch_size: 32, train_limit: 64}
budget: {average_bits: {weights: 4, activations: 4}}
stages: {search: {epochs: 1}, finetune: {epochs: 1}}
allocation: middle
batchnorm_batches: 1
calibration_batches: 1
device: cpu
threads: 1
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"],
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_a_run_under_a_launcher_ends_with_a_proven_model(tmp_path: Path, launcher: str) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    module, *options = LAUNCHERS[launcher]
    command = [*options, "-m", "--", "nipq", "train", "config.yaml", "--run", "run", "--quiet", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # the first process alone answers
    assert answer["verified"]
    assert answer["steps"] == 4
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


# ---------------------------------------------------------------------- what launchers say


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As process 1 of 2, on a port where nobody answers."""
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_single_process_makes_no_group() -> None:
    assert not is_launched()
    assert is_first()
    with accelerated(check_config(SETTINGS)) as accelerator:
        assert accelerator.num_processes == 1
        assert not torch.distributed.is_initialized()


def test_who_speaks_is_known_without_a_group(launched: pytest.MonkeyPatch) -> None:
    assert is_launched()
    assert not is_first()
    launched.setenv("RANK", "0")
    assert is_first()


def test_a_world_of_one_is_no_launch(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "1")
    assert not is_launched()


def test_processes_that_do_not_meet_are_an_error(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("LOCAL_RANK", "1")
    config = check_config({**SETTINGS, "parallel": {"timeout": 0.01}})
    with (
        pytest.raises(DistributedError, match=r"expected 2 processes to meet at localhost:1, found that they did not"),
        accelerated(config),
    ):
        pass


def test_each_process_takes_the_gpu_that_it_is_given(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    launched.setenv("LOCAL_RANK", "1")
    assert _has_cuda("auto")
    launched.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="expected a GPU for each process of this machine, found 2 GPUs and"):
        _has_cuda("cuda")


def test_an_error_of_the_connection_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    error, model = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), nn.Linear(1, 1)
    assert explained(error, model) is None
    monkeypatch.setattr(parallel, "is_distributed", lambda: True)
    found = explained(error, model)
    assert isinstance(found, DistributedError)
    assert "expected all 1 processes to take part in a training step" in str(found)
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), model) is None
