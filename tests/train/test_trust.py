"""A run folder from elsewhere is code: what it names is imported only if it is well known or trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nipq.cli.app import app
from nipq.errors import ConfigError
from nipq.train.config import check_config, read_yaml
from nipq.train.factory import check_trusted
from nipq.train.run_folder import RunFolder

KNOWN = {"data": {"kind": "digits"}, "budget": {"average_bits": {"weights": 4.0}}}


def config(factory: str, **more: object) -> object:
    return check_config({"model": {"factory": factory}, **KNOWN, **more})


@pytest.mark.parametrize("factory", ["resnet18", "nipq.train.models:digits_net", "torchvision.models:resnet18"])
def test_networks_of_known_packages_are_built(factory: str) -> None:
    check_trusted(config(factory), "run", trust=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", ["os:system", "mine:net", "torchvision.models:os.system", "nipq.files:os"])
def test_other_code_is_refused_unless_trusted(factory: str) -> None:
    with pytest.raises(ConfigError, match=r"run: expected a run whose model\.factory .*pass --trust"):
        check_trusted(config(factory), "run", trust=False)  # type: ignore[arg-type]
    check_trusted(config(factory), "run", trust=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [["verify"], ["export"]])
def test_commands_ask_before_they_import(command: list[str], tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(config("os:system"))  # type: ignore[arg-type]
    more = [str(tmp_path / "model.onnx")] if command == ["export"] else []
    found = CliRunner().invoke(app, [*command, str(place.path), *more])
    assert found.exit_code == 1
    assert "pass --trust" in found.output


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: [*a, *a]",
        "a: " + "[" * 3000,
        "a: " + "9" * 5000,
        "a: !!python/object/apply:os.system [ls]",
        "{" * 200_000,
    ],
)
def test_yaml_that_does_harm_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read_yaml(text, "config.yaml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 2**40},
        {"verify_batches": 10**20},
        {"optimizer": {"lr": float("inf")}},
        {"optimizer": {"lr": float("nan")}},
        {"optimizer": {"lr": 1e300}},
        {"stages": {"search": {"epochs": 10**12}}},
        {"data": {"kind": "digits", "batch_size": 10**15}},
        {"seed": 2**70},
    ],
)
def test_absurd_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"less than or equal to|finite number|valid integer"):
        config("resnet18", **wrong)


def test_a_folder_left_by_a_start_that_was_killed_can_be_started(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    place.environment.write_text("{}")
    (tmp_path / ".config.yaml.1234").write_text("half")
    with place.claimed():
        place.start(config("resnet18"))  # type: ignore[arg-type]
    assert place.holds_run()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    with place.claimed(), pytest.raises(ConfigError, match=r"found process \d+ on"), place.claimed():
        pass


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "layers.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": NaN}', '{"states": 3}', "\x00"])
def test_show_names_a_damaged_file(name: str, content: str, tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    place.start(config("resnet18"))  # type: ignore[arg-type]
    for file in (place.results, place.layers_json):
        file.write_text("{}" if file is place.results else "[]")
    (tmp_path / name).write_text(content + "\n")
    found = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert found.exit_code == 1
    assert not isinstance(found.exception, (KeyError, TypeError, ValueError, AttributeError))
