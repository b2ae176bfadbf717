"""``Config(target=...)``: what a runtime would not compute in integers is refused, or said by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config, Rule
from nipq.errors import ConfigError
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.report.inspect import inspect
from nipq.train.compare import Grid, expand
from nipq.train.config import check_config

X = torch.zeros(1, 4, 8, 8)


class Branches(nn.Module):
    """A shortcut that shares its input, a strange padding, other kinds of layers, and one on the result of a change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.body, self.shortcut = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.body(x) + self.shortcut(x)
        y = self.mirrored(x)
        x.relu_()  # the same tensor, another content
        return y.sum() + self.up(x)


def notes(target: str | None, **settings: Any) -> dict[str, str]:
    known = {finding.name: finding.reason for finding in validate(Branches(), X, Config(**settings))}
    found = validate(Branches(), X, Config(target=target, **settings))
    return {f.name: f.reason for f in found if f.severity == "note" and known.get(f.name) != f.reason}


def test_without_a_target_nothing_is_said() -> None:
    assert notes(None) == {}


def test_openvino_layers_in_floats_are_named() -> None:
    assert notes("openvino") == {
        "body": "it reads the same tensor as shortcut, so OpenVINO may compute it in floats",
        "shortcut": "it reads the same tensor as body, so OpenVINO may compute it in floats",
        "up": "it is a grouped transposed convolution, which OpenVINO computes in floats",
    }


def test_a_layer_that_a_rule_excludes_shares_nothing() -> None:
    assert "body" not in notes("openvino", rules=(Rule("shortcut", quantize=False),))


def test_inductor_layers_in_floats_are_named() -> None:
    assert notes("inductor") == {
        "mirrored": "it is a Conv2d with padding mode 'reflect', which Inductor computes in floats, exactly and slowly",
        "up": "it is a ConvTranspose2d, not a plain Conv2d or Linear, which Inductor computes in floats, exactly and "
        "slowly",
    }


@pytest.mark.parametrize(("target", "name"), [("openvino", "OpenVINO"), ("inductor", "Inductor")])
def test_inputs_that_stay_float_are_named(target: str, name: str) -> None:
    assert notes(target, input_bits=None)["stem"] == f"its input stays float, so {name} computes it in floats"


def test_onnxruntime_is_told_once() -> None:
    assert list(notes("onnxruntime")) == [""]
    assert "faithful session" in notes("onnxruntime")[""]


def test_inspect_shows_the_notes() -> None:
    found = inspect(Branches(), X, Config(target="openvino"))
    assert any("OpenVINO may compute it in floats" in finding.reason for finding in found.findings)
    assert "OpenVINO" in str(found)


@pytest.mark.parametrize("target", ["openvino", "inductor"])
def test_the_default_and_narrower_settings_pass(target: str) -> None:
    assert Config(target=target).weight_bits.choices == (2, 3, 4, 5, 6, 7, 8)
    config = Config(target=target, weight_bits=(2, 6), input_bits=None, rules=[Rule("stem", activation_bits=8)])
    assert Config.model_validate_json(config.model_dump_json()) == config
    prepare_(Branches(), X, config)


@pytest.mark.parametrize("target", ["openvino", "inductor"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": (2, 9)}, "found weight_bits of up to 9; lower them, or leave target out"),
        ({"activation_bits": {4, 16}}, "found activation_bits of up to 16"),
        ({"attention_bits": (4, 9)}, "found attention_bits of up to 9"),
        ({"input_bits": 10}, "found input_bits of up to 10"),
        ({"rules": [Rule("head.*", weight_bits=12)]}, r"found rule 'head\.\*': weight_bits of up to 12"),
        ({"rules": [Rule("a", activation_bits=(8, 9))], "weight_bits": 16}, "weight_bits of up to 16, rule 'a': activ"),
    ],
)
def test_wider_bits_are_refused_by_name(target: str, settings: dict[str, Any], message: str) -> None:
    Config(**settings)
    Config(target="onnxruntime", **settings)
    with pytest.raises(ConfigError, match=f"expected at most 8 bits for target '{target}', .*{message}"):
        Config(target=target, **settings)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Config\.target: expected 'onnxruntime', 'openvino' or 'inductor', found"):
        Config(target="tflite")


RUN = {
    "model": {"factory": "nipq.train.models:digits_net"},
    "data": {"kind": "digits"},
    "budget": {"average_bits": {"weights": 4}},
}


def test_run_configs_have_it() -> None:
    assert check_config({**RUN, "quantization": {"target": "openvino"}}).quantization.target == "openvino"
    with pytest.raises(ConfigError, match="at most 8 bits for target 'openvino'"):
        check_config({**RUN, "method": "diffq", "quantization": {"target": "openvino"}})


def test_grids_have_it() -> None:
    """DiffQ's own range of 2 to 15 bits is not for this runtime; the row has to say a narrower one."""
    base = {key: value for key, value in RUN.items() if key != "budget"} | {"quantization": {"target": "inductor"}}
    fields = {"name": "t", "base": base, "budgets": {"4": RUN["budget"]}, "seeds": [0]}
    cells = expand(Grid.model_validate({**fields, "methods": ["nipq", "lsq"]}))
    assert {check_config(cell.config).quantization.target for cell in cells} == {"inductor"}
    with pytest.raises(ConfigError, match=r"row 'diffq': .*weight_bits of up to 15"):
        expand(Grid.model_validate({**fields, "methods": ["nipq", "diffq"]}))
    bits = {"min": 2, "max": 8}
    narrow = {"method": "diffq", "quantization": {"weight_bits": bits, "activation_bits": bits}}
    assert expand(Grid.model_validate({**fields, "methods": {"nipq": None, "diffq": narrow}}))
