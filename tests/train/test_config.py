"""The config of a run: what is accepted, what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path

import pytest

from nipq.errors import ConfigError
from nipq.train.config import check_config, dump_config, load_config, parse_overrides

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = {"model": {"factory": "resnet18"}, "data": {"kind": "digits"}, "budget": {"model_size": "1 MB"}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_config_survives_being_written(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config


def test_there_are_example_configs() -> None:
    assert len(CONFIGS) >= 5


def test_config_is_frozen() -> None:
    config = check_config(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optimizer": {"learning_rate": 0.1}}, r"optimizer\.learning_rate"),
        ({"epochs": 3}, "epochs"),
        ({"stages": {"search": {"epochs": -1}}}, r"stages\.search\.epochs"),
        ({"data": {"kind": "cifar"}}, r"data\.kind"),
        ({"budget": {"average_bits": {"weights": -2}}}, r"budget\.average_bits\.weights"),
        ({"budget": {}}, "give at least one of average_bits, model_size and bit_ops"),
        ({"budget": {"average_bits": {}}}, "weights, activations or both"),
        ({"quantization": {"weight_bits": {"max": 40}}}, r"quantization\.weight_bits\.max"),
        ({"seed": -1}, "seed"),
        ({"oscillation": {"freeze": 0.2}}, r"oscillation\.freeze"),
        ({"stages": {"search": {"phase": "noise"}}}, r"stages\.search\.phase"),
        ({"allocation": "best"}, "allocation"),
        ({"noise_mix": "linear", "method": "lsq"}, "expected a method with noise beside noise_mix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_field_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_config({**SMALL, **change})


def test_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="model"):
        check_config({"data": {"kind": "digits"}, "budget": None})


def test_overrides_replace_fields(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {factory: resnet18}\ndata: {kind: digits}\nbudget: {model_size: 1 MB}\n", encoding="utf-8")
    config = load_config(path, parse_overrides(["optimizer.lr=1e-3", "seed=4", "stages.float.epochs=2"]))
    assert (config.optimizer.lr, config.seed, config.stages.float.epochs) == (1e-3, 4, 2)


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[1"])
def test_bad_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value|not YAML"):
        parse_overrides([text])


def test_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'seed' is 3, not a section"):
        load_config(path, {"seed.lr": 1})


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "mapping of fields"),
        ("a: {b: 1, c: 2, b: 3}", "the key 'b' twice"),
    ],
)
def test_file_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)
