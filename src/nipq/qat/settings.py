"""Checks of a QAT session's settings, all of them before anything is measured or trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from torch.optim import Optimizer

from nipq.budget.budget import Budget
from nipq.config import Phase
from nipq.errors import ConfigError, did_you_mean
from nipq.nn.layers import check_module
from nipq.qat.ema import check_decay
from nipq.qat.oscillation import MOMENTUM, check_oscillation

Allocation: TypeAlias = Literal["noise", "sensitivity", "hawq", "uniform"] | None
NoiseMix: TypeAlias = Literal["none", "linear", "cosine"]
Penalty: TypeAlias = Literal["controller", "paper"]

_OSCILLATION = ("dampen", "freeze", "momentum")


def check_model(model: object, budget: object, optimizers: Sequence[object]) -> None:
    """Refuse objects of other kinds.

    Args:
        model: the prepared model.
        budget: the limits, or None.
        optimizers: those of the loop.

    Raises:
        ConfigError: naming the first one.
    """
    check_module(model, "QATSession")
    if budget is not None and not isinstance(budget, Budget):
        raise ConfigError(
            f"QATSession: expected a budget, found {budget!r}. Give one such as nipq.AverageBits(weights=4), or None."
        )
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise ConfigError(
                f"QATSession: expected an optimizer of torch, or a list of them, found {type(one).__name__}. Build it "
                "from nipq.param_groups(model) after nipq.prepare_."
            )


def check_settings(
    *,
    total_steps: int,
    finetune: float,
    counts: Mapping[str, tuple[int, int]],
    finetune_phase: str,
    noise_mix: str,
    penalty: str,
    allocation: str | None,
    ramp: float,
    ema_decay: float | None,
    oscillation: Mapping[str, Any] | None,
    seed: int,
    functions: Mapping[str, Callable[..., Any] | None],
) -> None:
    """Refuse settings that are out of range or of another kind.

    Args:
        total_steps: of the session.
        finetune: of the session.
        counts: numbers of batches by name, each with the least one allowed.
        finetune_phase: of the session.
        noise_mix: of the session.
        penalty: of the session.
        allocation: of the session.
        ramp: of the session.
        ema_decay: of the session.
        oscillation: of the session.
        seed: of the session.
        functions: those that the session is given, by name.

    Raises:
        ConfigError: naming the first one.
    """
    _whole("total_steps", total_steps, 0)
    _share("finetune", finetune)
    _share("ramp", ramp)
    for name, (count, least) in counts.items():
        _whole(name, count, least)
    _whole("seed", seed, None)
    _choice("finetune_phase", finetune_phase, (Phase.ROUND.value, Phase.NOISE.value))
    _choice("noise_mix", noise_mix, get_args(NoiseMix))
    _choice("penalty", penalty, get_args(Penalty))
    _choice("allocation", allocation, ("noise", "sensitivity", "hawq", "uniform", None))
    if ema_decay is not None:
        check_decay(ema_decay, "QATSession(ema_decay=)")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"QATSession: expected {name} to be a function, found {type(function).__name__}.")
    if oscillation is not None:
        _check_oscillation(oscillation, total_steps)


def _check_oscillation(given: object, total_steps: int) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"QATSession: expected oscillation as a dict of {', '.join(_OSCILLATION)}, found {type(given).__name__}. "
            'Write for instance {"dampen": 1e-3}.'
        )
    for name in given:
        if name not in _OSCILLATION:
            hint = did_you_mean(str(name), _OSCILLATION, f"choose from {', '.join(_OSCILLATION)}.")
            raise ConfigError(f"QATSession: expected known names in oscillation, found {name!r}; {hint}")
    settings = {"dampen": None, "freeze": None, "momentum": MOMENTUM} | dict(given)
    for name, value in settings.items():
        if value is not None and not _is_number(value):
            raise ConfigError(f"QATSession: expected a number for oscillation's {name}, found {value!r}.")
    check_oscillation(total_steps, **settings)


def _whole(name: str, value: object, least: int | None) -> None:
    wrong = not isinstance(value, Integral) or isinstance(value, bool)
    if wrong or (least is not None and value < least):  # type: ignore[operator]  # a number
        floor = "" if least is None else f" of {least} or more"
        raise ConfigError(f"QATSession: expected {name} to be a whole number{floor}, found {value!r}.")


def _share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]  # a number
        raise ConfigError(f"QATSession: expected {name} from 0 to 1, a share of total_steps; found {value!r}.")


def _choice(name: str, value: object, choices: Sequence[object]) -> None:
    if not any(value == choice for choice in choices):
        raise ConfigError(f"QATSession: expected {name} {' or '.join(map(repr, choices))}, found {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool) and math.isfinite(value)
