"""From a config's rules to the settings of each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nipq.config import BitRange, Config, Granularity, GridChoice
from nipq.errors import ConfigError
from nipq.nn.layers import LayerSpec


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer after all rules.

    Attributes:
        weight_bits: bit-widths of the weight.
        activation_bits: bit-widths of the input, None when it stays float.
        granularity: one boundary for the weight, or one for each output channel.
        grid: levels of the input.
    """

    weight_bits: BitRange
    activation_bits: BitRange | None
    granularity: Granularity
    grid: GridChoice


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
                f"Rule {rule.pattern!r}: expected it to match a layer, found none. "
                f"Correct the pattern; layers are {names}{', ...' if len(layers) > 5 else ''}."
            )
    plans = [(spec, _plan(spec, config)) for spec in layers]
    return [(spec, plan) for spec, plan in plans if plan is not None]


def _plan(spec: LayerSpec, config: Config) -> LayerPlan | None:
    settings: dict[str, Any] = {}
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.pattern):
            settings |= {name: value for name, value in rule if value is not None}
    if settings.get("quantize") is False:
        return None
    activation_bits = settings.get("activation_bits", config.activation_bits)
    quantize_input = config.quantize_inputs
    if spec.is_input and "activation_bits" not in settings:
        if config.input_bits is None:
            quantize_input = False
        else:
            activation_bits = BitRange(fixed=config.input_bits)
    return LayerPlan(
        weight_bits=settings.get("weight_bits", config.weight_bits),
        activation_bits=activation_bits if settings.get("quantize_input", quantize_input) else None,
        granularity=settings.get("granularity", config.granularity),
        grid=settings.get("grid", "auto"),
    )
