"""``nipq.export``: which format, which errors, and that files appear whole or not at all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.errors import ConfigError, FileFormatError, MissingDependencyError, NonFiniteError
from nipq.export.api import export
from nipq.export.runtimes import faithful_session


def test_it_is_public() -> None:
    assert nipq.export is export


@pytest.mark.parametrize(("name", "expected"), [("model.npz", "arrays"), ("model.pt2", "program")])
def test_the_name_says_the_format(conv: nn.Module, tmp_path: Path, picture: Tensor, name: str, expected: str) -> None:
    report = export(conv, tmp_path / name, picture)
    assert report.format == expected
    assert report.bytes == (tmp_path / name).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_given_format_wins_over_the_name(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    assert export(conv, tmp_path / "model.onnx", picture, format="arrays").format == "arrays"


def test_the_report_prints_itself_and_is_json(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = zoo.deployed([zoo.numbers(9, 3), *[zoo.numbers(3, None)] * 6])
    report = export(model, tmp_path / "model.npz", zoo.inputs(2))
    text = str(report)
    assert text.startswith(f"{tmp_path / 'model.npz'}: arrays, {report.bytes:,} bytes\n")
    assert "layers.ConvTranspose3d" in text
    assert json.loads(json.dumps(report.to_dict()))["layers"][:2] == [
        {"name": "layers.Linear", "weight_bits": 9, "container": "int16", "input_bits": 3},
        {"name": "layers.Conv1d", "weight_bits": 3, "container": "int8", "input_bits": None},
    ]


def test_a_taken_name_is_refused_unless_told(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="expected a name that is free, found the file"):
        export(conv, path, picture)
    assert path.read_bytes() == b"mine"
    export(conv, path, picture, overwrite=True)
    assert path.read_bytes() != b"mine"
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ConfigError, match="found the folder"):
        export(conv, tmp_path / "folder.npz", picture, overwrite=True)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("model.tflite", {}, r"ends in .qonnx.onnx, .onnx, .npz, .pt2, found 'model.tflite'"),
        ("model", {"format": "tflite"}, "one of the formats onnx, qonnx, arrays, program, found 'tflite'"),
        ("model.npz", {"pack": True}, "pack=True with the format 'onnx' only, found 'arrays'"),
        ("absent/model.npz", {}, "to exist, found none"),
    ],
)
def test_what_cannot_be_asked_for(
    conv: nn.Module, tmp_path: Path, picture: Tensor, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(conv, tmp_path / name, picture, **settings)
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a deployed model, found a Linear"):
        export(nn.Linear(7, 6), tmp_path / "model.npz", torch.zeros(1, 7))


def test_a_model_that_cannot_be_traced_is_refused_and_leaves_nothing(zoo: SimpleNamespace, tmp_path: Path) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = zoo.alone(nn.Linear(7, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 0 else x

    with pytest.raises(ConfigError, match=r"Deciding: expected a model that torch\.export can trace"):
        export(Deciding(), tmp_path / "model.pt2", torch.zeros(2, 7))
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(
    conv: nn.Module, tmp_path: Path, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError("no space left")

    path = tmp_path / "model.npz"
    path.write_bytes(b"mine")
    monkeypatch.setattr("nipq.files.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        export(conv, path, picture, overwrite=True)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_scale_out_of_range_is_refused(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    pytest.importorskip("onnxscript")
    conv[0].scale[1], conv[0].input_step[0] = 1e38, 1e-5
    with pytest.raises(NonFiniteError, match="0: expected scale / input_step within the range of float32"):
        export(conv, tmp_path / "model.onnx", picture)


@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx"])
def test_a_missing_package_is_named(
    conv: nn.Module, tmp_path: Path, picture: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(module: str) -> None:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r'onnxscript.*pip install "nipq\[onnx\]"'):
        export(conv, tmp_path / name, picture)
    with pytest.raises(MissingDependencyError, match=r'onnxruntime.*pip install "nipq\[onnx\]"'):
        faithful_session(tmp_path / name)


def test_a_broken_file_is_refused_by_the_session(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(FileFormatError, match="expected an ONNX file that ONNX Runtime can run"):
        faithful_session(tmp_path / "broken.onnx")


def test_the_session_takes_contents(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export(conv, tmp_path / "model.onnx", picture).path
    (expected,), (found,) = (
        faithful_session(source, threads=1).run(None, {"input": picture.numpy()})
        for source in (path, path.read_bytes())
    )
    assert (found == expected).all()
    with pytest.raises(FileFormatError, match=r"^the contents: expected an ONNX file"):
        faithful_session(b"not a model")
    with pytest.raises(FileFormatError, match=r"^mine: expected an ONNX file"):
        faithful_session(b"not a model", name="mine")


def test_the_model_is_not_changed(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    before, state = conv(picture), {key: value.clone() for key, value in conv.state_dict().items()}
    export(conv, tmp_path / "model.npz", picture)
    export(conv, tmp_path / "model.pt2", picture)
    assert all(torch.equal(value, state[key]) for key, value in conv.state_dict().items())
    assert torch.equal(conv(picture), before)
    assert not conv[0]._forward_hooks
