from __future__ import annotations

import pytest

from nipq.config import BitRange, Config, Rule
from nipq.errors import ConfigError
from nipq.nn.layers import LayerSpec
from nipq.prepare.plan import LayerPlan, plan_layers


def spec(name: str, *, is_input: bool = False) -> LayerSpec:
    return LayerSpec(
        name=name,
        kind="Conv2d",
        macs=1,
        weight_count=1,
        activation_count=1,
        output_count=1,
        calls=1,
        batchnorm=None,
        is_input=is_input,
    )


LAYERS = [spec("stem", is_input=True), spec("block.0.conv1"), spec("block.1.conv1"), spec("head")]


def plans(*rules: Rule, **settings: object) -> dict[str, LayerPlan]:
    return {spec.name: plan for spec, plan in plan_layers(LAYERS, Config(rules=rules, **settings))}


def test_defaults_and_the_models_own_input() -> None:
    found = plans()
    assert found["head"] == LayerPlan(BitRange(), BitRange(), "tensor", "symmetric", "auto")
    assert found["stem"] == LayerPlan(BitRange(), BitRange(fixed=8), "tensor", "symmetric", "auto")


def test_the_models_own_input_may_stay_float_or_be_learned() -> None:
    assert plans(input_bits=None)["stem"].activation_bits is None
    assert plans(Rule("stem", activation_bits=(2, 8)))["stem"].activation_bits == BitRange()
    assert plans(Rule("stem", activation_bits=6), input_bits=None)["stem"].activation_bits == BitRange(fixed=6)
    assert plans(Rule("stem", quantize_input=True), input_bits=None)["stem"].activation_bits == BitRange()


def test_inputs_may_stay_float_and_a_rule_brings_one_back() -> None:
    found = plans(Rule("head", quantize_input=True), quantize_inputs=False)
    assert {name: plan.activation_bits for name, plan in found.items() if plan.activation_bits} == {"head": BitRange()}
    assert plans(Rule("*", quantize_input=False))["stem"].activation_bits is None


def test_rules_set_what_they_name_and_later_ones_override() -> None:
    found = plans(
        Rule("block.*", weight_bits=4, granularity="channel"),
        Rule("block.1.*", weight_bits={2, 8}, grid="signed"),
        granularity="tensor",
    )
    assert found["block.0.conv1"] == LayerPlan(BitRange(fixed=4), BitRange(), "channel", "symmetric", "auto")
    assert found["block.1.conv1"] == LayerPlan(BitRange(allowed=(2, 8)), BitRange(), "channel", "symmetric", "signed")
    assert found["head"].weight_bits == BitRange()


def test_a_rule_excludes_and_a_later_one_takes_back() -> None:
    assert list(plans(Rule("block.*", quantize=False))) == ["stem", "head"]
    assert list(plans(Rule("*", quantize=False), Rule("head", quantize=True))) == ["head"]


def test_a_rule_that_matches_no_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Rule 'blok\.\*': expected it to match a layer, found none.*stem, block"):
        plans(Rule("blok.*", weight_bits=4))


def test_patterns_mind_case() -> None:
    with pytest.raises(ConfigError, match="Rule 'HEAD'"):
        plans(Rule("HEAD", weight_bits=4))
