"""Everything that prints as a table fits a terminal of any usual width, with whole borders and whole parts of names."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from torch import nn

from nipq.budget.bit_table import LimitCost
from nipq.cli import doctor
from nipq.cli.show import layers_table, results_table
from nipq.config import Config, Rule
from nipq.export.api import ExportedLayer, ExportedProduct, ExportReport
from nipq.prepare.prepare import prepare_
from nipq.ptq.report import QuantizationReport, Stage
from nipq.report.inspect import inspect
from nipq.report.summary import summary
from nipq.verify.result import Check, VerifyResult

WIDTHS = (80, 100, 120, 160)
#: Names as transformers have them.
LONG = [
    f"model.language_model.encoder.layers.{layer}.{part}"
    for layer in (3, 27)
    for part in (
        "self_attn.q_proj",
        "self_attn.products.probability_value",
        "sparse_moe.gate_up_projection",
    )
]


class Deep(nn.Module):
    """A network whose layers have the names of a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.names = LONG
        for name in LONG:
            at: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.add_module(last, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def shown(part: RenderableType, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(part)
    return text.getvalue().splitlines()


def check(part: RenderableType, names: list[str] = ()) -> None:  # type: ignore[assignment]
    for width in WIDTHS:
        lines = [line.rstrip() for line in shown(part, width)]
        assert max(map(len, lines)) <= width
        ends = {"┏": "┓", "┃": "┃", "┡": "┩", "│": "│", "└": "┘", "┌": "┐", "├": "┤"}
        assert all(line[-1] == ends[line[0]] for line in lines if line and line[0] in ends)
        tables = re.split(r"(?m)^(?![┏┃┡│└┌├]).*\n?", "\n".join(lines))
        assert all(len({len(line) for line in table.splitlines()}) == 1 for table in tables if table.strip())
        # Names stay whole, or are broken behind their dots: without borders and blanks they are all there.
        first = "".join(line.lstrip("│ ").split("│")[0].split("  ")[0].strip() for line in lines)
        assert all(name in first for name in names)
        for name in names:
            for part_of_name in name.split("."):
                assert any(part_of_name in line for line in lines)


@pytest.fixture(scope="module")
def deep() -> Deep:
    return Deep().eval()


def test_inspect(deep: Deep) -> None:
    found = inspect(deep, torch.randn(2, 8), Config(rules=[Rule(LONG[1], quantize=False)]))
    check(found)
    check(found.tables()[0], [name for name in LONG if name != LONG[1]])
    assert max(map(len, str(found).splitlines())) <= 80


def test_inspect_of_resnet18() -> None:
    torchvision = pytest.importorskip("torchvision")
    found = inspect(torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64))
    check(found)
    check(found.tables()[0], [layer.spec.name for layer in found.layers])


def test_summary(deep: Deep) -> None:
    found = summary(prepare_(Deep(), torch.randn(2, 8)))
    check(found)
    check(found.table(), LONG)
    assert max(map(len, str(found).splitlines())) <= 80


def test_the_layers_of_show() -> None:
    rows = [
        {
            "name": name, "kind": "Conv2d", "weight_bits": 4, "activation_bits": None, "weight_alpha": 0.123,
            "activation_alpha": None, "weight_count": 12_345_678, "macs": 123_456_789,
        }
        for name in LONG
    ]  # fmt: skip
    check(layers_table(rows), LONG)
    for width in WIDTHS:
        lines = shown(layers_table(rows), width)
        assert all(any(line.split("  ")[0].strip() == name for line in lines) for name in LONG)  # never broken


def test_the_results_of_a_run() -> None:
    scores = {"test": {"accuracy": 91.5}, "validation": {"accuracy": 90.5}}
    limit = {"name": "bit-operations", "rounded": 1.234e10, "target": 2e10, "unit": "BOP"}
    results = {
        "states": dict.fromkeys(("float", "frozen", "bn", "finetuned"), scores), "limits": [limit],
        "average_bits": {"weights": 4.0, "activations": None}, "bytes": {"file": 123_456_789, "float32": 987_654_321},
        "verified": False, "seconds": 123.4, "steps": 123_456,
    }  # fmt: skip
    check(results_table(results, title="a-run-with-quite-a-long-name-in-a-folder: package.module.submodule:a_factory"))


def test_verify() -> None:
    numbers = {"layers": 123, "worst_output": 1.234e-5, "metric_trained": 99.123, "codes": 123_456_789}
    checks = [
        Check("E1 layers", "each layer on the trained inputs", False, numbers, f"{LONG[1]}: 3 codes apart", artifact)
        for artifact in ("deployed model", "a-model-with-a-long-name-for-its-file-and-an-ending.nipq.safetensors")
    ]
    check(VerifyResult(tuple(checks)))  # as rich shows an object that has no table of its own
    check(VerifyResult(tuple(checks)).table())
    assert max(map(len, str(VerifyResult(tuple(checks))).splitlines())) <= 80


def test_export(tmp_path: Path) -> None:
    layers = tuple(ExportedLayer(name, 4, "int4, packed", None) for name in LONG)
    products = (ExportedProduct(LONG[1], 8, 8),)
    report = ExportReport(tmp_path / "m.onnx", "onnx", 1, 21, layers, ("a warning " * 30,), products)
    check(report.table(), LONG)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'm.onnx'}: onnx, opset 21")  # a path is left whole
    assert max(map(len, lines[1:])) <= 80


def test_quantize() -> None:
    stages = [Stage(name, 0.012345, 99.1, True, 12.3, "relative") for name in ("mixed bits, round 1", "batch norms")]
    limit = LimitCost("average weight bits", "bit", 4.0, "bound", 3.9, 4.0)
    report = QuantizationReport("Deep", tuple(stages), 4.0, None, 123_456, 456_789, (limit,), 256, 64, 45.6)
    check(report)
    assert "123,456 bytes, 1/3.7 of the float model" in str(report)
    assert "[s]" in str(report)
    assert "[%]" in str(report)


@pytest.mark.parametrize("width", WIDTHS)
def test_doctor(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    missing = doctor.Examination("3.11", "Linux", 2, "cpu", "compiled", {"torch": None}, {"onnx": None, "timm": "1.0"})
    doctor._print(missing)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] in set("┏┃┡│└")]
    assert len(lines) > 5
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= width
