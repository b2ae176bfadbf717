"""Exports of layers with a forward of their own: right where a format holds them, refused by name elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nipq
from nipq.config import Config, Granularity
from nipq.errors import ConfigError, FileFormatError
from nipq.export.inductor import inductor_model
from nipq.prepare.layer_table import set_phase_
from tests.export.runtimes.test_inductor import needs_compiler
from tests.models.own_forwards import Gained, Padded, ScaledTable

IMAGE, IDS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12).reshape(4, 3) % 7


def build(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return nn.Sequential(layer, nn.Linear(6, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


CASES: dict[str, tuple[Any, Tensor]] = {
    "kept": (lambda: build(Gained(4, 4, 3, padding=1)), IMAGE),
    "linear": (lambda: build(Padded(4, 4, 2)), IMAGE),
    "table": (lambda: build(ScaledTable(7, 6)), IDS),
}


def deployed_of(case: str, config: Config) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = CASES[case]
    model = nipq.prepare_(make(), x, config)
    nipq.calibrate_(model, [x])
    nipq.freeze_bits_(model, nipq.AverageBits(weights=6))
    set_phase_(model.eval(), "round")
    return model, nipq.convert(model, x), x


@pytest.mark.parametrize("granularity", [pytest.param("tensor", marks=pytest.mark.slow), "channel"])
@pytest.mark.parametrize("end", ["onnx", "qonnx.onnx", "pt2"])
@pytest.mark.parametrize("case", CASES)
def test_files_hold_the_forward_of_the_layer(case: str, end: str, granularity: Granularity, tmp_path: Path) -> None:
    model, deployed, x = deployed_of(case, Config(granularity=granularity))
    nipq.export(deployed, tmp_path / f"model.{end}", x)
    result = nipq.verify(model, tmp_path / f"model.{end}", loader=[x])
    assert result, str(result)


@pytest.mark.parametrize(("case", "name"), [("kept", "2"), ("table", "0")])
def test_arrays_refuse_a_kept_layer_by_name_and_leave_no_file(case: str, name: str, tmp_path: Path) -> None:
    _, deployed, x = deployed_of(case, Config())
    with pytest.raises(ConfigError, match=f"^{name}: .*with a forward of its own that does more than its operation"):
        nipq.export(deployed, tmp_path / "model.npz", x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["inductor", "openvino"])
def test_a_target_that_computes_it_in_floats_says_so_before_training(target: Any) -> None:
    make, x = CASES["kept"]
    notes = [str(found) for found in nipq.validate(make(), x, Config(target=target)) if found.name == "2"]
    assert any("it is kept, and computes in floats" in note for note in notes)


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("case", ["kept", "linear"])
def test_integer_kernels_leave_it_exact_and_name_it(case: str) -> None:
    pytest.importorskip("torchao")
    _, deployed, x = deployed_of(case, Config())
    compiled = inductor_model(deployed, x)
    assert {kernel.name: kernel.integer for kernel in compiled.kernels} == {"0": True, "2": False, "5": True}
    assert any(warning.startswith("2: ") for warning in compiled.warnings)
    torch.testing.assert_close(compiled(x), deployed(x), rtol=0, atol=1e-5 * float(deployed(x).abs().max()))


@pytest.mark.parametrize("version", [b"1", b"2", b"4"])
def test_no_other_version_is_read_whatever_its_checksum(version: bytes, tmp_path: Path) -> None:
    _, deployed, _ = deployed_of("linear", Config())
    path = nipq.save(deployed, tmp_path / "model")
    data = path.read_bytes()
    assert data.count(b'\\"version\\":3') == 1
    path.write_bytes(data.replace(b'\\"version\\":3', b'\\"version\\":' + version))
    with pytest.raises(FileFormatError, match=rf"expected format version 3, found {version.decode()}. Use the release"):
        nipq.load(path, CASES["linear"][0]())


class WritesIntoInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0
        return super().forward(x)


class WritesIntoWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight[0] = 0
        return functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("kind", [WritesIntoInput, WritesIntoWeight])
@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx"])
def test_a_file_whose_layers_cannot_be_found_is_refused_and_not_left(kind: type, name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), kind(4, 4, 3)).eval()
    config = nipq.Config(weight_bits=4, activation_bits=6)
    deployed = nipq.convert(nipq.calibrate_(nipq.prepare_(model, x, config), [x]), x)
    with pytest.raises(ConfigError, match=r"expected a model of which torch.s exporter writes .*: 2: expected"):
        nipq.export(deployed, tmp_path / name, x)
    assert not list(tmp_path.iterdir())
    nipq.export(deployed, tmp_path / "model.pt2", x)
    assert nipq.verify(model, tmp_path / "model.pt2", [x])
