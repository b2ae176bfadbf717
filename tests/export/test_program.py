"""The ``torch.export`` program: the deployed model, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nipq.export.api import export
from nipq.export.onnx_write import FIXED_BATCH


def test_it_computes_the_same_bits_for_any_batch(zoo: SimpleNamespace, tmp_path: Path) -> None:
    numbers = [
        zoo.numbers(weight_bits, input_bits, grid, groups)
        for weight_bits, input_bits, grid, groups in (
            (2, 16, "signed", 1), (16, 2, "unsigned", 1), (4, 4, "shifted", 2), (8, 8, "signed", 1),
            (3, 5, "unsigned", 2), (5, 9, "shifted", 1), (4, None, "unsigned", 2),
        )
    ]  # fmt: skip
    model = zoo.deployed(numbers)
    report = export(model, tmp_path / "model.pt2", zoo.inputs(1))
    assert (report.format, report.opset, report.warnings) == ("program", None, ())
    program = torch.export.load(report.path).module()
    for batch in (1, 2, 5):
        inputs = zoo.inputs(batch)
        for found, expected in zip(program(*inputs), model(*inputs), strict=True):
            assert torch.equal(found, expected)


def test_weights_stay_integers(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    export(conv, tmp_path / "model.pt2", picture)
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    assert torch.equal(state["0.layer.weight"], conv[0].weight_codes)
    assert state["0.layer.weight"].dtype == torch.int8


def test_neither_data_nor_paths_are_in_the_file(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    export(conv, tmp_path / "model.pt2", picture)
    assert torch.export.load(tmp_path / "model.pt2").example_inputs is None
    assert b"modules.py" not in (tmp_path / "model.pt2").read_bytes()


def test_a_fixed_batch_is_a_warning(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = zoo.alone(nn.Conv2d(4, 6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.reshape(2, 4, 6, 5))

    assert export(Fixed(), tmp_path / "model.pt2", picture).warnings == (FIXED_BATCH,)


@pytest.mark.parametrize("inputs", [{"x": torch.ones(2, 7)}, [torch.ones(1, 7)]], ids=["named", "a_list"])
def test_inputs_in_every_form(zoo: SimpleNamespace, tmp_path: Path, inputs: object) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = zoo.alone(nn.Linear(7, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model = Named()
    export(model, tmp_path / "model.pt2", inputs)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(4, 7)
    found = program(x=x) if isinstance(inputs, dict) else program(x)
    assert torch.equal(found, model(x))
