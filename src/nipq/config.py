"""Settings of the quantizers: frozen, checked when built, and the same after a round trip through JSON.

Wherever a bit-width is expected, a short form does::

    4                       exactly 4 bits, nothing to learn
    (2, 8)                  learned, any whole number from 2 to 8
    {2, 4, 8}               learned, one of these; in JSON and YAML {"allowed": [2, 4, 8]}
    BitRange(max=6, ...)    all of it said out loud
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nipq.errors import ConfigError, did_you_mean


class Phase(StrEnum):
    """Computation of a model's quantizers in the forward pass.

    ``FLOAT`` passes the tensor on untouched; ``NOISE`` adds pseudo-quantization noise while training (and rounds in
    evaluation); ``ROUND`` rounds with straight-through gradients; ``INT`` computes on integer-valued codes, which is
    what a deployed model does.

    Example:
        >>> Phase("noise") is Phase.NOISE
        True
    """

    FLOAT = "float"
    NOISE = "noise"
    ROUND = "round"
    INT = "int"


def config_error(kind: type[BaseModel], error: ValidationError, known: Sequence[str]) -> ConfigError:
    """Error for settings that pydantic refused; each fault is a line with the field, and what was expected and found.

    Args:
        kind: the settings that were to be built.
        error: what pydantic found.
        known: names of fields, for what may have been meant.
    """
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join([kind.__name__, *map(str, fault["loc"])])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            hint = did_you_mean(str(fault["loc"][-1]), known, "correct its name or remove it.")
            lines.append(f"{place}: expected a known field, found this one; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: expected a value, found none; give one.")
        elif fault["type"] == "value_error":
            lines.append(f"{place}: {message}.")
        else:
            expected = message.removeprefix("Input should be ")
            lines.append(f"{place}: expected {expected}, found {_shown(fault['input'])}; change it.")
    return ConfigError("\n".join(lines))


def _shown(value: object) -> str:
    """A value of a config in a message, in 200 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of too many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


#: A signed grid needs 2 bits; codes of more than 16 are no longer exact once float32 adds up their products.
Bits = Annotated[int, Field(ge=2, le=16)]
Granularity = Literal["tensor", "channel"]
WeightLevels = Literal["symmetric", "balanced", "full"]
GridChoice = Literal["auto", "signed", "unsigned", "shifted"]
Method = Literal["nipq", "lsq", "lsq+", "pact", "diffq", "ste"]
NoiseKind = Literal["uniform", "empirical", "histogram", "gaussian", "stochastic"]
Init = Literal["mse", "max", "lsq", "release"]
Target = Literal["onnxruntime", "openvino", "inductor"]

#: Most bits of weights and inputs that a runtime computes in integers and as trained; one that is not here takes all.
_TARGET_BITS: dict[Target | None, int] = {"openvino": 8, "inductor": 8}


class Settings(BaseModel):
    """Base of all settings: frozen, unknown fields refused, and every fault a :class:`~nipq.errors.ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401  (each field has its own type)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise config_error(type(self), error, _field_names(type(self))) from error

    # Settings inside other settings then skip __init__, and a message names the whole path to the faulty field.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own mark

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:  # noqa: ANN401  (pydantic's own signature)
        """Build from a mapping or a short form; a fault is a ``ConfigError``."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise config_error(cls, error, _field_names(cls)) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:  # noqa: ANN401
        """Build from JSON text; a fault is a ``ConfigError``."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise config_error(cls, error, _field_names(cls)) from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that JSON can hold; ``model_validate`` turns them into equal settings."""
        return self.model_dump(mode="json")


class BitRange(Settings):
    """Bit-widths that one tensor may take, and where learning starts.

    What was left out is filled in, so ``start`` is never ``None`` and ``min`` and ``max`` are the ends of ``choices``.

    Args:
        min: fewest bits, 2 to 16.
        max: most bits, 2 to 16, at least ``min``.
        allowed: the only bit-widths to choose from; ``None`` for every whole number from ``min`` to ``max``.
        start: bit-width at which learning starts, within the range; the middle if left out, where the sigmoid of the
            bit parameter is steepest (the release starts in the middle of 2 to 14, too).
        fixed: exactly this many bits, nothing to learn.

    Raises:
        ConfigError: if a bit-width is outside 2 to 16, the range is empty, or settings contradict each other.

    Example:
        >>> BitRange(max=4).choices
        (2, 3, 4)
        >>> BitRange.model_validate({2, 4, 8}).choices
        (2, 4, 8)
        >>> BitRange.model_validate(3).fixed
        3
    """

    min: Bits = 2
    max: Bits = 8
    allowed: tuple[Bits, ...] | None = None
    start: float | None = None
    fixed: Bits | None = None

    @property
    def choices(self) -> tuple[int, ...]:
        """The allowed whole bit-widths, ascending."""
        return self.allowed or tuple(range(self.min, self.max + 1))

    @property
    def low(self) -> float:
        """Lower end of the sigmoid's range, in bits."""
        return float(self.min)

    @property
    def high(self) -> float:
        """Upper end of the sigmoid's range, in bits."""
        return float(self.max)

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: object) -> object:
        if isinstance(value, Mapping | BitRange):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return {"fixed": value}
        if isinstance(value, Set):
            return {"allowed": list(value)}
        if isinstance(value, tuple) and len(value) == 2:
            return {"min": value[0], "max": value[1]}
        if isinstance(value, list):
            ends = f"{min(value)}, {max(value)}" if value and all(isinstance(v, int) for v in value) else "2, 8"
            low, high = ends.split(", ")
            every = ", ".join(map(str, value)) or "2, 4, 8"
            raise ValueError(
                f"expected a range or a set of bit-widths, found the list {value!r}, which may be either; write "
                f"({ends}) or {{min: {low}, max: {high}}} for the range, {{{every}}} or {{allowed: [{every}]}} for the "
                "set"
            )
        raise ValueError(
            'expected a number of bits, a pair (fewest, most), a set, {"allowed": [...]} or a BitRange; '
            f"found {value!r}; write for instance 4, (2, 8) or {{2, 4, 8}}"
        )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.fixed is not None:
            choices = [self.fixed]
        elif self.allowed is not None:
            choices = sorted(set(self.allowed))
        else:
            choices = list(range(self.min, self.max + 1))
        if not choices:
            raise ValueError(
                f"expected at least one bit-width, found min={self.min}, max={self.max}, allowed={self.allowed}; "
                "min must not be above max, nor allowed empty"
            )
        resolved = {
            "min": choices[0],
            "max": choices[-1],
            "allowed": tuple(choices) if len(choices) <= choices[-1] - choices[0] else None,
            "start": (choices[0] + choices[-1]) / 2 if self.start is None else self.start,
            "fixed": choices[0] if len(choices) == 1 else None,
        }
        for name in self.model_fields_set & {"min", "max", "fixed"}:
            if getattr(self, name) not in (None, resolved[name]):
                raise ValueError(
                    f"expected settings that agree, found {name}={getattr(self, name)} beside bit-widths "
                    f"{', '.join(map(str, choices))}; leave {name} out"
                )
        if not choices[0] <= resolved["start"] <= choices[-1]:  # type: ignore[operator]  # a number by now
            raise ValueError(
                f"expected start from {choices[0]} to {choices[-1]}, found {self.start:g}; move it into the range"
            )
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # frozen for others
        return self


class Rule(Settings):
    """Settings for the layers whose full name matches a pattern; what is left out stays as it was.

    Later rules override earlier ones, setting by setting. A rule that matches no layer is an error.

    Args:
        pattern: shell pattern on the layer's full name, such as ``"layer1.*.conv?"``; ``*`` crosses dots.
        weight_bits: bit-widths of the weight.
        activation_bits: bit-widths of the layer's input (the model's own input included, if the layer reads it).
        granularity: clipping ranges of the weight, one per ``"tensor"`` or one per output ``"channel"``.
        weight_levels: levels of the weight, see :class:`Config`.
        grid: levels of the layer's input; ``"auto"`` lets calibration choose.
        quantize: ``False`` leaves the whole layer float.
        quantize_input: ``False`` leaves the layer's input float.

    Raises:
        ConfigError: if a setting is wrong.

    Example:
        >>> Rule("classifier", weight_bits=8).weight_bits.choices
        (8,)
    """

    pattern: str = Field(min_length=1)
    weight_bits: BitRange | None = None
    activation_bits: BitRange | None = None
    granularity: Granularity | None = None
    weight_levels: WeightLevels | None = None
    grid: GridChoice | None = None
    quantize: bool | None = None
    quantize_input: bool | None = None

    def __init__(self, pattern: str, **settings: Any) -> None:  # noqa: ANN401  (each field has its own type)
        super().__init__(pattern=pattern, **settings)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own mark


class Config(Settings):
    """Settings of ``prepare_``: the same for every layer, then rules for some.

    Args:
        weight_bits: bit-widths of weights.
        activation_bits: bit-widths of layer inputs.
        input_bits: fixed bit-width of the model's own input (an image has 8); ``None`` leaves it float.
        learn_input_range: whether gradients move the clipping range of the model's own input after calibration;
            ``None`` where its bit-width is learned or below 8. For it the first layer has to compute the gradient of
            the data, in a ResNet-18 a tenth of a training step, and 8 bits leave a clipping range little to gain.
        embedding_bits: bit-widths of embedding tables, whose weight alone is quantized; ``None`` leaves them float. A
            table that a layer multiplies with, too (tied embeddings), has that layer's settings instead.
        attention_bits: bit-widths of query, key, probability and value in modules that call torch's function
            ``scaled_dot_product_attention``; ``None`` leaves attention float. Rules find a module's products under
            ``"*.attention_products.*"``; their ``activation_bits`` are those of both operands.
        shared_bits: patterns of layer names, such as ``("*.query", "*.key", "*.value")``: of the layers that match one,
            those that read the same tensor share one bit-width for their weights and one for their inputs.
        granularity: clipping ranges of weights, one per ``"tensor"`` (the paper) or one per output ``"channel"``.
            Tables have one, unless a rule gives each row its own by ``"channel"``.
        weight_levels: levels of weights of b bits: ``"symmetric"``, 2^b - 1 of them, zero included (the paper);
            ``"balanced"``, 2^b at odd multiples of half a step, without zero, meant for 2 and 3 bits; ``"full"``, 2^b
            from -2^(b-1) to 2^(b-1) - 1 steps, as LSQ publishes it.
            Balanced weights of 8 bits and more become symmetric ones, as their odd codes would not fit a byte.
        method: fake quantization in training: ``"nipq"`` the noise proxy, or a baseline on the same quantizer:
            ``"lsq"``, ``"lsq+"``, ``"pact"``, ``"diffq"`` or ``"ste"`` (straight-through estimator, fixed range); see
            ``nipq.nn.estimators``.
        noise: ``"uniform"`` (fast; about equal accuracy) or ``"empirical"``, drawn from the tensor's own rounding
            errors (what the theory is about; ``"histogram"`` by the published sampler); paper section 6.3. Not in the
            paper: ``"gaussian"`` (DiffQ's default) and ``"stochastic"`` (randomised rounding).
        stochastic_bits: draw a whole bit-width at every training forward (paper Eq. 15).
        clip_after_noise: keep noisy values inside the range (not in the paper).
        range_correction: add the T4b term, which makes the clipping range's gradient that of the actual quantization
            error (not in the paper).
        init: first clipping range: ``"mse"`` least squared error, ``"max"`` largest magnitude, ``"lsq"`` LSQ's start,
            ``"release"`` the constants of the published code.
        quantize_inputs: ``False`` quantizes weights only.
        target: the runtime that is to compute the deployed model, ``"onnxruntime"``, ``"openvino"`` or ``"inductor"``:
            bit-widths that it does not compute in integers are refused, and ``validate`` and ``inspect`` name the
            layers that it will not. ``None`` for any.
        rules: exceptions by layer name.

    Raises:
        ConfigError: if a setting is wrong; the message names the field, or the rule.

    Example:
        >>> config = Config(weight_bits=(2, 6), rules=[Rule("conv1", weight_bits=8)])
        >>> Config.model_validate_json(config.model_dump_json()) == config
        True
    """

    weight_bits: BitRange = BitRange()
    activation_bits: BitRange = BitRange()
    input_bits: Bits | None = 8
    learn_input_range: bool | None = None
    embedding_bits: BitRange | None = BitRange(fixed=8)
    attention_bits: BitRange | None = None
    shared_bits: tuple[str, ...] = ()
    granularity: Granularity = "tensor"
    weight_levels: WeightLevels = "symmetric"
    method: Method = "nipq"
    noise: NoiseKind = "uniform"
    stochastic_bits: bool = True
    clip_after_noise: bool = False
    range_correction: bool = False
    init: Init = "mse"
    quantize_inputs: bool = True
    target: Target | None = None
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _within_target(self) -> Self:
        most, names = _TARGET_BITS.get(self.target, 16), ("weight_bits", "activation_bits")
        asked = {name: getattr(self, name).max for name in names} | {"input_bits": self.input_bits}
        asked["attention_bits"] = None if self.attention_bits is None else self.attention_bits.max
        for rule in self.rules:
            given = {name: getattr(rule, name) for name in names}
            asked |= {f"rule {rule.pattern!r}: {name}": bits.max for name, bits in given.items() if bits is not None}
        faults = [f"{where} of up to {bits}" for where, bits in asked.items() if bits is not None and bits > most]
        if faults:
            raise ValueError(
                f"expected at most {most} bits for target {self.target!r}, which computes no wider ones in integers, "
                f"found {', '.join(faults)}; lower them, or leave target out"
            )
        return self

    @model_validator(mode="after")
    def _within_method(self) -> Self:
        asked = {"weight_levels": self.weight_levels}
        asked |= {f"rule {rule.pattern!r}: weight_levels": rule.weight_levels or "symmetric" for rule in self.rules}
        faults = [f"{where} {levels!r}" for where, levels in asked.items() if levels != "symmetric"]
        if self.method == "pact" and faults:
            raise ValueError(
                "expected weight_levels 'symmetric' with method 'pact', whose range of weights (SAWB) is fitted for "
                f"them, found {', '.join(faults)}; leave weight_levels out, or choose another method such as 'lsq'"
            )
        return self

    if TYPE_CHECKING:  # type checkers would otherwise refuse the short forms

        def __init__(self, **settings: Any) -> None: ...  # noqa: ANN401


def _field_names(kind: type[BaseModel]) -> list[str]:
    return [*kind.model_fields, *BitRange.model_fields, *Rule.model_fields]
