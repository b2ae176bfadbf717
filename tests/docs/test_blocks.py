"""The Python blocks of the README and of the first pages run as they stand there, on small stand-ins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nipq

ROOT = Path(__file__).parents[2]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide"


def block(page: Path, text: str) -> str:
    """The one Python block of a page that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [code for code in blocks if text in code]
    return found


def run(page: Path, text: str, names: dict[str, Any]) -> None:
    exec(compile(block(page, text), f"{page.name}: {text}", "exec"), names)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages say is the reader's own."""
    monkeypatch.chdir(tmp_path)
    loader = [(torch.rand(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(4)]
    return {
        "torch": torch,
        "nipq": nipq,
        "model": nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 6 * 6, 3),
        ),
        "example_inputs": loader[0][0][:1],
        "loader": loader,
        "batches": loader * 2,
        "steps": len(loader) * 2,
        "criterion": nn.CrossEntropyLoss(),
    }


def within(model: nn.Module, budget: nipq.AverageBits) -> bool:
    return all(cost.rounded <= cost.target for cost in nipq.costs(model, budget))


def test_readme_post_training(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = {key: value.clone() for key, value in names["model"].state_dict().items()}
    run(README, "nipq.quantize(", names)
    assert Path("model.nipq.safetensors").stat().st_size > 0
    assert capsys.readouterr().out
    after = names["model"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_readme_training(names: dict[str, Any]) -> None:
    run(README, "nipq.QATSession(", names)
    assert names["session"].stage == "done"
    assert within(names["model"], names["budget"])
    assert Path("trained.nipq.safetensors").stat().st_size > 0


def test_quickstart_training(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("nipq.inspect(", "nipq.QATSession(", "nipq.convert("):
        run(GUIDE / "quickstart.md", text, names)
    assert within(names["model"], names["budget"])
    assert Path("trained.nipq.safetensors").stat().st_size > 0
    assert capsys.readouterr().out


def test_quickstart_post_training(names: dict[str, Any]) -> None:
    run(GUIDE / "quickstart.md", "nipq.quantize(", names)
    assert Path("model.nipq.safetensors").stat().st_size > 0


def test_the_page_on_training(names: dict[str, Any]) -> None:
    run(GUIDE / "training.md", "nipq.QATSession(", names)
    assert names["session"].bits is not None
    assert within(names["model"], names["budget"])


def test_settings_and_budgets_are_accepted(names: dict[str, Any]) -> None:
    run(GUIDE / "choosing-a-budget.md", "nipq.Config(", names)
    assert names["config"].weight_bits.choices == (2, 4, 8)
    assert len(names["config"].rules) == 3
    run(GUIDE / "choosing-a-budget.md", "nipq.ModelSize(", names)
    nipq.prepare_(names["model"], names["example_inputs"])
    nipq.calibrate_(names["model"], names["loader"])
    assert len(nipq.costs(names["model"], names["budget"])) == 2


def test_the_readme_has_the_commands_of_ci() -> None:
    for name, end in (("demo", "nipq demo"), ("test", "--dist loadfile")):
        (command,) = re.findall(rf"<!-- ci:{name} -->\n```bash\n(.*)\n```", README.read_text(encoding="utf-8"))
        assert command.startswith("python -m venv .venv && ")
        assert command.endswith(end)
