from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nipq.config import BitRange, Config, Rule
from nipq.errors import ConfigError

# ---------------------------------------------------------------------- bit ranges


def test_default_range_is_two_to_eight_and_starts_in_the_middle() -> None:
    bits = BitRange()
    assert bits.choices == (2, 3, 4, 5, 6, 7, 8)
    assert (bits.low, bits.high, bits.start, bits.fixed) == (2.0, 8.0, 5.0, None)


@pytest.mark.parametrize(
    ("short", "choices", "fixed"),
    [
        (4, (4,), 4),
        ((2, 8), (2, 3, 4, 5, 6, 7, 8), None),
        ({8, 2, 4}, (2, 4, 8), None),
        (frozenset({2, 3}), (2, 3), None),
        ({"allowed": [8, 4, 2, 4]}, (2, 4, 8), None),
        ({"fixed": 16}, (16,), 16),
        ((6, 6), (6,), 6),
        ({5}, (5,), 5),
        (BitRange(max=3), (2, 3), None),
    ],
)
def test_short_forms(short: object, choices: tuple[int, ...], fixed: int | None) -> None:
    bits = BitRange.model_validate(short)
    assert bits.choices == choices
    assert bits.fixed == fixed
    assert (bits.min, bits.max) == (choices[0], choices[-1])
    assert Config(weight_bits=short).weight_bits == bits
    assert Rule("x", activation_bits=short).activation_bits == bits


def test_ranges_said_in_different_ways_are_equal() -> None:
    assert BitRange(fixed=4) == BitRange(min=4, max=4) == BitRange(allowed=(4,))
    assert BitRange(min=2, max=4) == BitRange(allowed=(4, 3, 2))


def test_release_range_starts_at_eight_bits() -> None:
    assert BitRange(min=2, max=14).start == 8


@given(st.sets(st.integers(2, 16), min_size=1), st.floats(0, 1))
def test_every_range_survives_plain_values_and_json(allowed: set[int], share: float) -> None:
    start = min(allowed) + share * (max(allowed) - min(allowed))
    bits = BitRange(allowed=tuple(allowed), start=min(max(start, min(allowed)), max(allowed)))
    assert bits.choices == tuple(sorted(allowed))
    assert BitRange.model_validate(bits.to_dict()) == bits
    assert BitRange.model_validate_json(bits.model_dump_json()) == bits
    assert BitRange.model_validate(bits.model_dump(exclude_none=True)) == bits


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([4, 8], r"weight_bits: expected a range or a set.*the list \[4, 8\].*\(4, 8\) or .*\{allowed: \[4, 8\]\}"),
        (1, r"Config\.weight_bits\.fixed: expected greater than or equal to 2, found 1"),
        (17, r"fixed: expected less than or equal to 16, found 17"),
        ((8, 2), r"weight_bits: expected at least one bit-width, found min=8, max=2.*min must not be above max"),
        (set(), r"expected at least one bit-width, found .*allowed=\(\)"),
        ({1, 4}, r"allowed\.0: expected greater than or equal to 2, found 1"),
        ((2, 4, 8), r"expected a number of bits, a pair .* found \(2, 4, 8\); write for instance"),
        ("four", r"found 'four'; write for instance"),
        (True, r"found True; write for instance"),
        ({"start": 9}, r"expected start from 2 to 8, found 9; move it into the range"),
        ({"start": float("nan")}, r"start: expected a finite number, found nan"),
        ({"fixed": 4, "max": 8}, r"expected settings that agree, found max=8 beside bit-widths 4; leave max out"),
        ({"allowed": [2, 4], "min": 3}, r"found min=3 beside bit-widths 2, 4; leave min out"),
        ({"maximum": 4}, r"weight_bits\.maximum: expected a known field, found this one"),
    ],
)
def test_bad_ranges_name_the_field_and_what_was_found(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(weight_bits=value)


# ---------------------------------------------------------------------- rules and the whole


def test_rule_takes_its_pattern_by_position_or_by_name() -> None:
    assert Rule("features.*", grid="signed") == Rule(pattern="features.*", grid="signed")


def test_config_survives_json() -> None:
    config = Config(
        weight_bits={2, 4, 8},
        input_bits=None,
        granularity="channel",
        noise="empirical",
        rules=[Rule("a", weight_bits=4, quantize_input=False), {"pattern": "b.*", "quantize": False}],
    )
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert Config.model_validate(config.to_dict()) == config
    assert config.rules[1] == Rule("b.*", quantize=False)


def test_config_can_be_copied_pickled_and_hashed() -> None:
    config = Config(rules=[Rule("a", weight_bits=4)])
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, copy.deepcopy(config)}) == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().noise = "empirical"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nose": "uniform"}, r"Config\.nose: expected a known field, found this one; did you mean 'noise'\?"),
        ({"zzz": 1}, r"Config\.zzz: .*correct its name or remove it"),
        ({"noise": "pink"}, r"Config\.noise: expected 'uniform', 'empirical', .*found 'pink'"),
        ({"input_bits": 1}, r"Config\.input_bits: expected greater than or equal to 2, found 1"),
        ({"rules": [{"quantize": False}]}, r"Config\.rules\.0\.pattern: expected a value, found none"),
        ({"rules": [{"pattern": ""}]}, r"Config\.rules\.0\.pattern: "),
        ({"rules": [{"pattern": "a", "grid": "odd"}]}, r"Config\.rules\.0\.grid: expected 'auto', .* found 'odd'"),
    ],
)
def test_bad_settings_name_the_field_and_what_was_found(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**settings)
    with pytest.raises(ConfigError, match=message):
        Config.model_validate(settings)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)Config\.noise.*Config\.init"):
        Config(noise="loud", init="guess")


def test_bad_json_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^Config: expected"):
        Config.model_validate_json("{")


def test_bad_rule_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"Rule\.granularity: expected 'tensor' or 'channel', found 'group'"):
        Rule("a", granularity="group")
