"""What is no model, and what is no budget, is refused by every function that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nipq
from nipq.errors import ConfigError

X = torch.randn(4, 3)
BUDGET = nipq.AverageBits(weights=4)

TAKES_A_MODEL: dict[str, Callable[[Any, Path], object]] = {
    "prepare_": lambda model, _: nipq.prepare_(model, X),
    "validate": lambda model, _: nipq.validate(model, X),
    "inspect": lambda model, _: nipq.inspect(model, X),
    "quantize": lambda model, _: nipq.quantize(model, [X], BUDGET),
    "param_groups": lambda model, _: nipq.param_groups(model),
    "calibrate_": lambda model, _: nipq.calibrate_(model, [X]),
    "allocate_bits_": lambda model, _: nipq.allocate_bits_(model, [X], BUDGET),
    "freeze_bits_": lambda model, _: nipq.freeze_bits_(model),
    "QATSession": lambda model, _: nipq.QATSession(model, BUDGET, 3, loader=[X]),
    "summary": lambda model, _: nipq.summary(model),
    "convert": lambda model, _: nipq.convert(model),
    "save": lambda model, folder: nipq.save(model, folder / "model.nipq.safetensors"),
    "load": lambda model, folder: nipq.load(folder / "model.nipq.safetensors", model),
    "export": lambda model, folder: nipq.export(model, folder / "model.onnx", X),
    "verify": lambda model, _: nipq.verify(model, nn.Linear(3, 2), [X]),
    "restore_": lambda model, _: nipq.restore_(model),
}
MODELS = {"function": len, "name": "resnet18", "class": nn.Linear, "nothing": None, "shape": (3, 4)}


@pytest.mark.parametrize("command", TAKES_A_MODEL)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model_is_refused(command: str, kind: str, tmp_path: Path) -> None:
    found = "the class Linear" if kind == "class" else type(MODELS[kind]).__name__
    with pytest.raises(ConfigError, match=rf"expected a model \(torch\.nn\.Module\), found {found}\."):
        TAKES_A_MODEL[command](MODELS[kind], tmp_path)


@pytest.mark.parametrize("command", TAKES_A_MODEL)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_module_of_torchscript_is_refused(command: str, tmp_path: Path) -> None:
    model = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="expected a module with Python code, found one compiled by TorchScript"):
        TAKES_A_MODEL[command](model, tmp_path)


@pytest.mark.parametrize("budget", ["4 bits", 4, {"weights": 4}])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    model = nipq.calibrate_(nipq.prepare_(nn.Linear(3, 2), X), [X])
    for command in (
        lambda: nipq.quantize(nn.Linear(3, 2), [X], budget),
        lambda: nipq.allocate_bits_(model, [X], budget),
        lambda: nipq.freeze_bits_(model, budget),
        lambda: nipq.QATSession(model, budget, 3),
    ):
        with pytest.raises(ConfigError, match="expected a budget, found"):
            command()
