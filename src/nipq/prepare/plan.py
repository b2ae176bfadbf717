"""Settings of each layer from a config's rules, groups of layers that share bit-widths, and limits of a target runtime.

Bit-widths are checked by :class:`nipq.config.Config` itself. Grids need no check for a target: every runtime takes
signed and unsigned ones, and shifted ones with whole zero points, and there are no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nipq.config import BitRange, Config, Granularity, GridChoice, Target, WeightLevels
from nipq.errors import ConfigError
from nipq.nn.layers import LayerSpec

#: Layers that the compiler's int8 passes know.
INDUCTOR_KINDS = (nn.Conv2d, nn.Linear)
#: Modules in which PEFT keeps the layers of its adapters.
ADAPTERS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
#: Names of the runtimes in messages.
_NAMES = {"openvino": "OpenVINO", "inductor": "Inductor"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer after all rules.

    Attributes:
        weight_bits: bit-widths of the weight.
        activation_bits: bit-widths of the input, None when it stays float.
        granularity: one clipping range for the weight, or one for each output channel.
        weight_levels: levels of the weight.
        grid: levels of the input.
    """

    weight_bits: BitRange
    activation_bits: BitRange | None
    granularity: Granularity
    weight_levels: WeightLevels
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


def is_adapter(name: str) -> bool:
    """Return whether a layer is an adapter of PEFT's, which stays float unless a rule names it."""
    return not ADAPTERS.isdisjoint(name.split("."))


def _settings(spec: LayerSpec, config: Config) -> dict[str, Any]:
    """Settings that rules give a layer, by name."""
    settings: dict[str, Any] = {}
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.pattern):
            settings |= {name: value for name, value in rule if value is not None}
    return settings


def _plan(spec: LayerSpec, config: Config) -> LayerPlan | None:
    settings = _settings(spec, config)
    if settings.get("quantize") is False or (is_adapter(spec.name) and not settings):
        return None
    if spec.is_product:  # both operands are activations
        bits = settings.get("activation_bits", config.attention_bits)
        if bits is None or settings.get("quantize_input") is False:
            return None
        grid: GridChoice = "unsigned" if spec.kind == "ProbabilityValue" else settings.get("grid", "auto")
        return LayerPlan(bits, bits, "tensor", "symmetric", grid)
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
        weight_levels=settings.get("weight_levels", config.weight_levels),
        grid=settings.get("grid", "auto"),
    )


def _table_plan(spec: LayerSpec, tied: LayerPlan | None, config: Config) -> LayerPlan | None:
    """Settings of a table; one that a layer multiplies with has that layer's."""
    settings = _settings(spec, config)
    weight_bits, granularity = (tied.weight_bits, tied.granularity) if tied else (config.embedding_bits, "tensor")
    weight_bits = settings.get("weight_bits", weight_bits)
    if settings.get("quantize") is False or weight_bits is None:
        return None
    levels = settings.get("weight_levels", tied.weight_levels if tied else config.weight_levels)
    return LayerPlan(weight_bits, None, settings.get("granularity", granularity), levels, "auto")


def target_notes(
    model: nn.Module, plans: dict[str, tuple[LayerSpec, LayerPlan]], shared: dict[str, tuple[str, ...]], target: Target
) -> Iterator[tuple[str, str]]:
    """Notes on layers that a runtime will not compute in integers, before anything is trained.

    Args:
        model: the float model.
        plans: layers that are to be quantized and their settings, by name.
        shared: names of the layers that read the same tensor, by the name of each.
        target: the runtime.

    Yields:
        Name of the layer (empty for the model) and the reason.
    """
    if target == "onnxruntime":
        yield "", "ONNX Runtime computes what was trained in its faithful session only, on exact levels in floats"
        return
    for name, (spec, plan) in plans.items():
        if spec.is_product:
            if target == "inductor":
                yield name, "it is a product inside attention, which Inductor computes in floats, exactly and slowly"
            continue
        if spec.is_table:
            continue  # looked up everywhere
        layer = model.get_submodule(name)
        others = [other for other in shared.get(name, ()) if other in plans and other != name]
        if plan.activation_bits is None:
            yield name, f"its input stays float, so {_NAMES[target]} computes it in floats"
        elif target == "inductor" and (reason := inductor_reason(layer)):
            yield name, f"it is {reason}, which Inductor computes in floats, exactly and slowly"
        elif target == "openvino" and isinstance(layer, _TRANSPOSED) and layer.groups > 1:
            yield name, "it is a grouped transposed convolution, which OpenVINO computes in floats"
        elif target == "openvino" and others:
            yield name, f"it reads the same tensor as {', '.join(others)}, so OpenVINO may compute it in floats"


def inductor_reason(layer: nn.Module) -> str | None:
    """Reason why Inductor's int8 passes do not take a layer of at most 8 bits.

    Args:
        layer: the layer, or its shell.

    Returns:
        The kind of layer in words, or None if they take it.

    Example:
        >>> inductor_reason(nn.Conv1d(1, 1, 1)), inductor_reason(nn.Linear(1, 1))
        ('a Conv1d, not a plain Conv2d or Linear', None)
    """
    if type(layer) not in INDUCTOR_KINDS:
        return f"a {type(layer).__name__}, not a plain Conv2d or Linear"
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else f"a {type(layer).__name__} with padding mode {mode!r}"


def shared_groups(
    plans: Iterable[tuple[LayerSpec, LayerPlan]], shared: Mapping[str, tuple[str, ...]], config: Config
) -> list[tuple[str, ...]]:
    """Groups of layers that share their bit-widths: those of ``config.shared_bits`` that read the same tensor.

    Args:
        plans: layers that are to be quantized, and their settings.
        shared: names of the layers that read the same tensor, by the name of each.
        config: settings.

    Returns:
        Names of the layers of each group, two at least, in the order of execution.

    Raises:
        ConfigError: if a pattern leads to no group, or a group's layers have different bit-widths to choose from.
    """
    found = {spec.name: plan for spec, plan in plans if not spec.is_table and not spec.is_product}
    chosen = [name for name in found if any(fnmatchcase(name, pattern) for pattern in config.shared_bits)]
    groups = dict.fromkeys(tuple(other for other in shared.get(name, ()) if other in chosen) for name in chosen)
    kept = [group for group in groups if len(group) > 1]
    for pattern in config.shared_bits:
        if not any(fnmatchcase(name, pattern) for group in kept for name in group):
            raise ConfigError(
                f"shared_bits {pattern!r}: expected it to match a layer that reads the same tensor as another one of "
                f"these patterns, found none. Correct it; layers are {', '.join(list(found)[:5])}, ..."
            )
    for first, *others in kept:
        for other in others:
            ours, theirs = ((found[name].weight_bits, found[name].activation_bits) for name in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"{other}: expected the bit-widths of {first}, with which it is to share them, found others. "
                    "Let the rules give both the same weight_bits and activation_bits."
                )
    return kept
