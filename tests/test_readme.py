"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nipq

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def tiny_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)
    )


def test_the_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    loader = [(torch.rand(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(4)]
    names = {
        "model": tiny_net(),
        "example_inputs": loader[0][0][:1],
        "loader": loader,
        "criterion": nn.CrossEntropyLoss(),
        "epochs": 2,
    }
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert (tmp_path / "model.nipq.safetensors").stat().st_size > 0
    assert "0.weight" not in dict(names["model"].named_parameters())
    assert capsys.readouterr().out


def test_the_settings_are_accepted() -> None:
    names = {"nipq": nipq}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert names["config"].weight_bits.choices == (2, 4, 8)
    assert len(names["config"].rules) == 3
