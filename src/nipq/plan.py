"""From a config's rules to the settings of each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from nipq.config import BitRange, Config, Rule
from nipq.errors import ConfigError
from nipq.nn.layers import LayerSpec


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer after all rules."""

    weight_bits: BitRange
    activation_bits: BitRange | None
    granularity: Literal["tensor", "channel"]
    grid: Literal["auto", "signed", "unsigned", "shifted"]


def plan_layers(layers: Iterable[LayerSpec], config: Config) -> list[tuple[LayerSpec, LayerPlan]]:
    """Settings of every layer that is to be quantized; later rules override earlier ones, setting by setting.

    Args:
        layers: the layers of a trace.
        config: settings and rules.

    Returns:
        Layers that no rule excludes, each with its settings, in the given order.

    Raises:
        ConfigError: if a rule matches no layer.
    """
    layers = list(layers)
    for rule in config.rules:
        if not any(fnmatchcase(spec.name, rule.pattern) for spec in layers):
            names = ", ".join(spec.name for spec in layers[:5])
            raise ConfigError(
                f"Rule {rule.pattern!r}: expected it to match a layer, found none. Layers are {names}"
                f"{', ...' if len(layers) > 5 else ''}; patterns are shell patterns on full names."
            )
    plans = [(spec, _plan(spec, config)) for spec in layers]
    return [(spec, plan) for spec, plan in plans if plan is not None]


def _plan(spec: LayerSpec, config: Config) -> LayerPlan | None:
    merged = Rule(pattern=spec.name)
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.pattern):
            merged = merged.model_copy(update=rule.model_dump(exclude_none=True, exclude={"pattern"}, round_trip=True))
    if merged.quantize is False:
        return None
    activation_bits = _as_range(merged.activation_bits) or config.activation_bits
    quantize_input = config.quantize_inputs if merged.quantize_input is None else merged.quantize_input
    if spec.is_input and merged.activation_bits is None:
        quantize_input = quantize_input and config.input_bits is not None
        if config.input_bits is not None:
            activation_bits = BitRange(fixed=config.input_bits)
    return LayerPlan(
        weight_bits=_as_range(merged.weight_bits) or config.weight_bits,
        activation_bits=activation_bits if quantize_input else None,
        granularity=merged.granularity or config.granularity,
        grid=merged.grid or "auto",
    )


def _as_range(value: BitRange | dict[str, object] | None) -> BitRange | None:
    return BitRange.model_validate(value) if isinstance(value, dict) else value
