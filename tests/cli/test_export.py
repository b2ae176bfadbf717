"""``nipq export``: from a run folder or a packed file, with exit status and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nipq.cli import app
from nipq.export import arrays_reference as reference
from nipq.export.packed_read import load
from nipq.train.config import load_config
from nipq.train.models import digits_net
from nipq.train.pipeline import run
from nipq.train.run_folder import RunFolder

SETTINGS = """
model: {factory: "nipq.train.models:digits_net", kwargs: {width: 8}}
data: {kind: digits, train_limit: 128}
budget: {average_bits: {weights: 4, activations: 4}}
stages: {float: {epochs: 1}, search: {epochs: 1}, finetune: {epochs: 1}}
device: cpu
threads: 1
"""
ARCHITECTURE = ("--model", "nipq.train.models:digits_net", "--kwargs", "{width: 8}", "--input-shape", "1,1,8,8")


def call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def call_json(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    status, output = call(*arguments, "--json")
    answer = json.loads(output)
    assert isinstance(answer, dict)
    return status, answer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    path = folder.parent / "config.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    run(load_config(path), folder, quiet=True)
    return folder


def test_a_run_becomes_arrays(finished: Path, tmp_path: Path) -> None:
    status, answer = call_json("export", finished, tmp_path / "model.npz")
    assert (status, answer["ok"], answer["format"]) == (0, True, "arrays")
    assert answer["bytes"] == (tmp_path / "model.npz").stat().st_size
    deployed = load(RunFolder(finished).model, digits_net(width=8))
    layers = reference.load(tmp_path / "model.npz")
    assert [layer["name"] for layer in answer["layers"]] == list(layers)
    x = torch.rand(3, 1, 8, 8)
    found = reference.run(layers["stem"], x.numpy())
    np.testing.assert_array_equal(found, deployed.get_submodule("stem")(x).numpy())


def test_a_run_becomes_onnx(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    status, output = call("export", finished, tmp_path / "model.onnx", "--pack")
    assert status == 0
    assert "onnx, opset 2" in output
    assert "classifier" in output


def test_a_packed_file_and_its_architecture_are_the_same_model(finished: Path, tmp_path: Path) -> None:
    assert call("export", finished, tmp_path / "run.npz")[0] == 0
    assert call("export", RunFolder(finished).model, tmp_path / "file.npz", *ARCHITECTURE)[0] == 0
    assert (tmp_path / "run.npz").read_bytes() == (tmp_path / "file.npz").read_bytes()


def test_a_given_shape_needs_no_data(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nipq.cli.export.load_data", None)
    assert call("export", finished, tmp_path / "model.npz", "--input-shape", "1,1,8,8")[0] == 0


def test_overwrite(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.npz"
    out.write_bytes(b"mine")
    status, answer = call_json("export", finished, out)
    assert (status, answer["ok"], out.read_bytes()) == (1, False, b"mine")
    assert "--overwrite" in answer["message"]
    assert call("export", finished, out, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "model.tflite"), "expected a name that ends in"),
        (("RUN", "model.npz", "--format", "tflite"), "expected one of the formats"),
        (("FILE", "model.npz"), "expected --model and --input-shape"),
        (("FILE", "model.npz", *ARCHITECTURE[:2], *ARCHITECTURE[4:]), "of shape"),
        (("absent", "model.npz"), "expected --model and --input-shape"),
        (("EMPTY", "model.npz"), "found no config.yaml"),
    ],
    ids=["suffix", "format", "no_architecture", "wrong_architecture", "no_file", "no_run"],
)
def test_errors(finished: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    places = {"RUN": str(finished), "FILE": str(RunFolder(finished).model), "EMPTY": str(tmp_path)}
    source, out, *rest = (places.get(argument, argument) for argument in arguments)
    status, answer = call_json("export", source, tmp_path / out, *rest)
    assert (status, answer["ok"]) == (1, False)
    assert message in answer["message"]
    assert not list(tmp_path.iterdir())


def test_packing_is_refused_for_a_target_that_cannot_use_it(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace("target: null", "target: openvino"), encoding="utf-8")
    status, answer = call_json("export", folder, tmp_path / "model.onnx", "--pack")
    assert (status, answer["ok"]) == (1, False)
    assert "expected no --pack for a run of target 'openvino'" in answer["message"]
    assert call_json("export", folder, tmp_path / "model.onnx")[0] == 0


def test_an_unfinished_and_an_unproven_run_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps(results | {"verified": False}), encoding="utf-8")
    assert "equals the trained one" in call_json("export", folder, tmp_path / "model.npz")[1]["message"]
    (folder / "results.json").unlink()
    assert "expected a finished run" in call_json("export", folder, tmp_path / "model.npz")[1]["message"]
