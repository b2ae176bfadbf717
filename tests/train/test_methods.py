"""One word for a set of settings: what it fills in, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nipq.budget.budget import costs
from nipq.config import Config
from nipq.errors import ConfigError
from nipq.prepare.layer_table import input_quantizers, layer_table, quantizers
from nipq.train import config as config_module
from nipq.train.config import METHODS, check_config, dump_config, load_config, merged
from nipq.train.trainer import Trainer

BASE: dict[str, Any] = {"model": {"factory": "resnet18"}, "data": {"kind": "digits"}, "budget": {"model_size": "1 MB"}}
WORD = {"allocation": "uniform", "quantization": {"init": "max", "noise": "empirical"}, "optimizer": {"lr": 0.5}}


@pytest.fixture
def word(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, "planted", WORD)
    return "planted"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_config(method: str) -> None:
    config = check_config({**BASE, "method": method})
    assert config.method == method
    assert check_config(config.model_dump(mode="json")) == config


def test_method_fills_in_what_is_not_given(word: str) -> None:
    config = check_config({**BASE, "method": word, "quantization": {"noise": "uniform"}, "optimizer": {"momentum": 0}})
    assert config.allocation == "uniform"
    assert (config.quantization.init, config.quantization.noise) == ("max", "uniform")
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.5, 0)


def test_settings_given_as_an_object_stand(word: str) -> None:
    config = check_config({**BASE, "method": word, "quantization": Config(noise="uniform", weight_bits=3)})
    assert (config.quantization.init, config.quantization.noise) == ("max", "uniform")
    assert config.quantization.weight_bits.fixed == 3


def test_written_config_is_complete(word: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = check_config({**BASE, "method": word})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    monkeypatch.setitem(METHODS, word, {"optimizer": {"lr": 7.0}})  # a later release means something else by it
    assert load_config(tmp_path / "config.yaml") == config


def test_merging_changes_neither_side() -> None:
    under, over = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": None}
    assert merged(under, over) == {"a": {"b": 1, "c": [2]}, "d": None}
    assert (under, over) == ({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": None})


@pytest.mark.parametrize("wrong", ["nipk", 3, None])
def test_unknown_method_lists_the_known_ones(wrong: object) -> None:
    with pytest.raises(ConfigError, match=rf"expected one of .*nipq.*found {wrong!r}"):
        check_config({**BASE, "method": wrong})


def test_close_method_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "METHODS", {"nipq": {}, "straight": {}})
    with pytest.raises(ConfigError, match="did you mean 'straight'"):
        check_config({**BASE, "method": "strait"})


def test_a_range_of_bits_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "planted", {"quantization": {"weight_bits": {"min": 2, "max": 14, "start": 8}}})
    config = check_config({**BASE, "method": "planted", "quantization": {"weight_bits": {"allowed": [2, 4]}}})
    assert config.quantization.weight_bits.choices == (2, 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_keeps_the_budget(
    method: str, make_config: Callable[..., Any], until: Callable[[Trainer, str], Trainer]
) -> None:
    if METHODS[method].get("allocation") == "hawq":
        pytest.importorskip("curvlinops")
    inputs = METHODS[method].get("quantization", {}).get("quantize_inputs", True)
    config = make_config(
        method=method,
        budget={"average_bits": {"weights": 4, **({"activations": 4} if inputs else {})}},
        model={"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}},
        data={"kind": "digits", "batch_size": 32, "train_limit": 64},
        stages={"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 1}},
        optimizer={"lr": 0.01},
    )
    trainer = until(Trainer(config), "done")
    assert trainer.budget is not None
    assert bool(input_quantizers(layer_table(trainer.model))) == inputs
    assert all(quantizer.is_frozen for quantizer in quantizers(trainer.model))
    assert all(limit.rounded <= limit.target * (1 + 1e-12) for limit in costs(trainer.model, trainer.budget))
    assert list(trainer.progress.states)[-1] == "finetuned"
