"""From a config's rules to the settings of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    multiplying = {spec.name: _plan(spec, config) for spec in layers if not spec.is_table}
    tables = {
        spec.name: _table_plan(spec, multiplying.get(spec.tied_to or ""), config) for spec in layers if spec.is_table
    }
    plans = multiplying | tables
    found = [(spec, plan) for spec in layers if (plan := plans[spec.name]) is not None]
    _check_whole(layers, {spec.name for spec, _ in found})
    return found


def _check_whole(layers: Sequence[LayerSpec], planned: set[str]) -> None:
    """Refuse rules that quantize one product of an attention and not the other."""
    products = [spec.name for spec in layers if spec.is_product]
    for scores, mix in zip(products[::2], products[1::2], strict=True):
        if (scores in planned) != (mix in planned):
            raise ConfigError(
                f"{scores}: expected both products of an attention to be quantized or neither, found one excluded. "
                f"Use one pattern for both, such as Rule({scores.removesuffix('scores') + '*'!r}, quantize=False)."
            )


def _settings(spec: LayerSpec, config: Config) -> dict[str, Any]:
    """What the rules say of a layer."""
    settings: dict[str, Any] = {}
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.pattern):
            settings |= {name: value for name, value in rule if value is not None}
    return settings


def _plan(spec: LayerSpec, config: Config) -> LayerPlan | None:
    settings = _settings(spec, config)
    if settings.get("quantize") is False:
        return None
    if spec.is_product:  # both operands are activations
        bits = settings.get("activation_bits", config.attention_bits)
        if bits is None or settings.get("quantize_input") is False:
            return None
        grid: GridChoice = "unsigned" if spec.kind == "ProbabilityValue" else settings.get("grid", "auto")
        return LayerPlan(bits, bits, "tensor", grid)
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


def _table_plan(spec: LayerSpec, tied: LayerPlan | None, config: Config) -> LayerPlan | None:
    """Settings of a table; one that a layer multiplies with has that layer's."""
    settings = _settings(spec, config)
    weight_bits, granularity = (tied.weight_bits, tied.granularity) if tied else (config.embedding_bits, "tensor")
    weight_bits = settings.get("weight_bits", weight_bits)
    if settings.get("quantize") is False or weight_bits is None:
        return None
    return LayerPlan(weight_bits, None, settings.get("granularity", granularity), "auto")
