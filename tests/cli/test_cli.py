"""The commands: exit status, one clear message, JSON that parses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import nipq
from nipq.cli import app
from nipq.cli import train as demo
from nipq.cli.app import COMMANDS
from nipq.cli.doctor import OPTIONAL
from nipq.train.config import check_config, load_config
from nipq.train.pipeline import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SETTINGS = """
model: {factory: "nipq.train.models:digits_net", kwargs: {width: 8}}
data: {kind: digits, train_limit: 256}
budget: {average_bits: {weights: 4, activations: 4}}
stages: {float: {epochs: 1}, search: {epochs: 1}, finetune: {epochs: 1}}
device: cpu
threads: 1
"""


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


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    path = folder.parent / "config.yaml"
    path.write_text(SETTINGS, encoding="utf-8")
    run(load_config(path), folder, quiet=True)
    return folder


def test_help_names_every_command() -> None:
    status, output = call("--help")
    assert status == 0
    assert all(name in output for name in ("doctor", "demo", "inspect", "train", "show", "verify"))


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "nipq", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "doctor" in done.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], []], ids=["version", "help", "completion"])
def test_the_command_line_starts_without_torch(arguments: list[str]) -> None:
    """Help, version and completion of command names load neither torch nor any command."""
    code = """
import sys
from nipq.cli import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "scipy", "nipq.train", "nipq.qat"} & set(sys.modules)
    print("LOADED", sorted(heavy))
"""
    complete = {"_NIPQ_COMPLETE": "complete_bash", "COMP_WORDS": "nipq v", "COMP_CWORD": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **({} if arguments else complete)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['nipq', *{arguments}]\n{code}"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    said = {"--version": f"nipq {nipq.__version__}", "--help": "doctor"}.get("".join(arguments), "verify")
    assert said in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_explains_its_options(name: str) -> None:
    status, output = call(name, "--help")
    assert status == 0
    assert "--json" in output


def test_doctor() -> None:
    status, answer = call_json("doctor")
    assert (status, answer["ok"]) == (0, True)
    assert answer["required"]["torch"] is not None
    assert "ready" in call("doctor")[1]


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    extras = {name: extra for name, extra in extras.items() if name not in ("dev", "docs")}
    packages = {re.split("[>=<]", text)[0] for extra in extras.values() for text in extra if "nipq[" not in text}
    assert set(OPTIONAL) == packages


def test_doctor_fails_when_a_core_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nipq.cli.doctor.REQUIRED", ("torch", "no-such-package"))
    status, output = call("doctor")
    assert status == 1
    assert "missing: no-such-package" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_doctor_cannot_tune_without_a_gpu() -> None:
    status, answer = call_json("doctor", "--tune")
    assert status == 1
    assert "expected an NVIDIA GPU" in answer["message"]


def test_inspect() -> None:
    arguments = ("inspect", "nipq.train.models:digits_net", "--input-shape", "1,1,8,8", "--kwargs", "{width: 4}")
    status, answer = call_json(*arguments)
    assert status == 0
    assert "classifier" in json.dumps(answer)
    assert "classifier" in call(*arguments)[1]
    assert "faithful session" in json.dumps(call_json(*arguments, "--target", "onnxruntime")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "resnet19"), "no torchvision model 'resnet19'"),
        (("inspect", "nipq.train.models:digits_net"), "cannot take an input of shape (1, 3, 224, 224)"),
        (("inspect", "resnet18", "--input-shape", "1,3,big"), "expected a shape such as 1,3,224,224"),
        (("inspect", "resnet18", "--kwargs", "3"), "expected --kwargs to be a mapping"),
        (("inspect", "resnet18", "--target", "tpu"), "Config.target: expected 'onnxruntime', 'openvino' or 'inductor'"),
        (("train", "absent.yaml", "--run", "absent"), "expected a YAML config file"),
        (("show", "absent"), "found no config.yaml"),
        (("verify", "absent"), "found no config.yaml"),
    ],
    ids=[
        "unknown_model",
        "wrong_shape",
        "unreadable_shape",
        "kwargs",
        "target",
        "no_config",
        "show_nothing",
        "verify_nothing",
    ],
)
def test_own_errors_are_one_message_and_status_1(arguments: tuple[str, ...], message: str) -> None:
    status, answer = call_json(*arguments)
    assert (status, answer["ok"]) == (1, False)
    assert message in answer["message"]
    status, output = call(*arguments)
    assert status == 1
    assert output.startswith("error:")
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


def test_wrong_usage_is_status_2() -> None:
    assert call("train")[0] == 2


def test_train_overrides_and_refuses_to_overwrite(settings: Path, tmp_path: Path) -> None:
    arguments = ("train", settings, "--run", tmp_path / "run", "--set", "seed=3", "--set", "data.train_limit=128")
    status, answer = call_json(*arguments)
    assert (status, answer["ok"], answer["seed"]) == (0, True, 3)
    status, answer = call_json(*arguments)
    assert status == 1
    assert "already holds a run" in answer["message"]
    status, answer = call_json(*arguments, "--resume")
    assert (status, answer["ok"]) == (0, True)


def test_train_takes_the_target(settings: Path, tmp_path: Path) -> None:
    arguments = ("train", settings, "--run", tmp_path / "run", "--target", "openvino")
    status, answer = call_json(*arguments, "--set", "quantization.weight_bits={min: 2, max: 9}")
    assert (status, answer["ok"]) == (1, False)
    assert "expected at most 8 bits for target 'openvino'" in answer["message"]


def test_train_takes_the_data_folder(settings: Path, tmp_path: Path) -> None:
    arguments = ("train", settings, "--run", tmp_path / "run", "--set", "data.kind=fashion_mnist")
    status, answer = call_json(*arguments, "--data", tmp_path / "pictures")
    assert status == 1
    assert str(tmp_path / "pictures") in answer["message"]


def test_train_fails_when_verify_does(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nipq.cli.train.run", lambda *_args, **_kwargs: {"verified": False})
    assert call_json("train", settings, "--run", tmp_path / "run")[0] == 1


def test_show(finished: Path) -> None:
    status, answer = call_json("show", finished)
    assert (status, answer["finished"]) == (0, True)
    assert answer["layers"][0]["name"] == "stem"
    status, output = call("show", finished)
    assert status == 0
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert {layer["name"] for layer in answer["layers"]} <= {line.split()[0] for line in lines if line.strip()}


def test_show_never_splits_a_name(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    layers = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    layers[0]["name"] = "bert.encoder.layer.0.attention.self.attention_products.probability_value"
    (folder / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    assert layers[0]["name"] in call("show", folder)[1]


def test_epochs_are_a_line_each_where_output_is_redirected(settings: Path, tmp_path: Path) -> None:
    _, output = call("train", settings, "--run", tmp_path / "run")
    lines = [line for line in output.splitlines() if line.startswith(("float 1", "search 1", "fine-tune 1"))]
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert all(re.search(r"  train loss [\d.]+  val accuracy [\d.]+ %", line) for line in lines)
    assert all(re.search(r"  W/A bits [2-8]\.\d\d/[2-8]\.\d\d", line) for line in lines[1:])


def test_show_of_a_run_under_way(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings.rename(tmp_path / "run" / "config.yaml")
    status, output = call("show", tmp_path / "run")
    assert status == 0
    assert "not finished" in output


def test_verify_again(finished: Path) -> None:
    status, answer = call_json("verify", finished)
    assert (status, answer["ok"]) == (0, True)
    assert call("verify", finished)[0] == 0


def test_verify_takes_files(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.nipq.safetensors"
    copy.write_bytes((finished / "model.nipq.safetensors").read_bytes())
    status, answer = call_json("verify", finished, copy)
    assert (status, answer["ok"]) == (0, True)
    assert [check["artifact"] for check in answer["checks"]] == ["deployed model"] * 4 + [copy.name] * 4
    copy.write_bytes(copy.read_bytes()[:-1])
    status, answer = call_json("verify", finished, copy)
    assert (status, answer["ok"]) == (1, False)
    assert [check["passed"] for check in answer["checks"]] == [True] * 4 + [False]
    assert "DIFFERS" in call("verify", finished, copy)[1]


def test_verify_of_an_unfinished_run(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings.rename(tmp_path / "run" / "config.yaml")
    status, answer = call_json("verify", tmp_path / "run")
    assert status == 1
    assert "expected a finished run" in answer["message"]


def test_verify_notices_another_model(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    content = bytearray((folder / "model.nipq.safetensors").read_bytes())
    content[-1] ^= 0xFF
    (folder / "model.nipq.safetensors").write_bytes(bytes(content))
    assert call_json("verify", folder)[0] == 1


def test_demo_settings_are_the_example_config() -> None:
    assert check_config(demo.DEMO) == load_config(CONFIGS / "digits.yaml")


def test_demo_says_which_promise_was_broken(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    results["average_bits"]["weights"] = 4.01
    monkeypatch.setattr("nipq.cli.train.run", lambda *_args, **_kwargs: results)
    status, output = call("demo")
    assert status == 1
    assert "BROKEN  average bits at or below 4.0 / 4.0" in output


def test_demo_promises_are_about_the_test_images() -> None:
    def results(quantized: float) -> dict[str, Any]:
        states = {"float": {"test": {"accuracy": 98.0}}, "finetuned": {"test": {"accuracy": quantized}}}
        return {"states": states, "average_bits": {"weights": 4.0, "activations": 4.0}, "verified": True}

    assert all(demo.promises(results(97.0)).values())
    assert not all(demo.promises(results(96.9)).values())


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path: Path) -> None:
    status, answer = call_json("demo", "--run", tmp_path / "run")
    assert (status, answer["ok"]) == (0, True)
