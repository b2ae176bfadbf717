"""What ``prepare_`` would refuse, leave float, or do in a way worth knowing, said beforehand and by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from nipq.config import Config
from nipq.errors import NotQuantizableError
from nipq.nn.layers import SUPPORTED
from nipq.plan import plan_layers
from nipq.trace import ExampleInputs, Trace, trace

# Wrappers that change how parameters are found; by name, so that none has to be imported.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


@dataclass(frozen=True)
class Finding:
    """One thing that ``prepare_`` would refuse, leave float, or do in a way worth knowing.

    Attributes:
        name: full name of the module.
        severity: ``"error"`` (refused), ``"float"`` (stays float) or ``"note"``.
        reason: what was found.
        remedy: what to do about it, empty when there is nothing to do.
    """

    name: str
    severity: Literal["error", "float", "note"]
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line: severity, name, reason, remedy."""
        return f"{self.severity}: {self.name or 'the model'}: {self.reason}.{' ' + self.remedy if self.remedy else ''}"


def validate(model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None) -> list[Finding]:
    """Everything that ``prepare_`` would refuse, leave float, or do in a way worth knowing; changes nothing.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: as for :func:`prepare_`.

    Returns:
        Findings, refusals first.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs.
        ConfigError: if a rule matches no layer.
    """
    traced = trace(model, example_inputs)
    order = {"error": 0, "float": 1, "note": 2}
    return sorted(_findings(model, traced, config or Config()), key=lambda finding: order[finding.severity])


def checked_trace(model: nn.Module, example_inputs: ExampleInputs, config: Config) -> Trace:
    """Trace a model that can be prepared.

    Args:
        model: a float model.
        example_inputs: what it is called with.
        config: settings, for the layers that rules exclude.

    Returns:
        The trace.

    Raises:
        NotQuantizableError: with every refusal, each by its module's name.
        ConfigError: if a rule matches no layer.
    """
    # A wrapped model is refused before it is run: some wrappers cannot run a watched forward.
    errors = list(_wrapper_findings(model))
    if not errors:
        traced = trace(model, example_inputs)
        errors = [finding for finding in _findings(model, traced, config) if finding.severity == "error"]
    if errors:
        raise NotQuantizableError("prepare_: " + "\n".join(str(finding) for finding in errors))
    return traced


def _wrapper_findings(model: nn.Module) -> Iterable[Finding]:
    if type(model).__name__ in _WRAPPERS:
        yield Finding(
            "",
            "error",
            f"it is wrapped in {type(model).__name__}",
            "Prepare the model first, then wrap, distribute or compile it.",
        )


def _findings(model: nn.Module, traced: Trace, config: Config) -> list[Finding]:
    findings = list(_wrapper_findings(model))
    planned = {spec.name for spec, _ in plan_layers(traced.layers, config)}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SUPPORTED):
            findings += _layer_findings(name, module, name in planned)
            owners.setdefault(id(module.weight), []).append(name)
        else:
            findings += [
                Finding(f"{name}.{key}".lstrip("."), "float", f"{type(module).__name__} has no quantized form here")
                for key, parameter in module.named_parameters(recurse=False)
                if parameter.ndim > 1
            ]
    findings += [Finding(name, "float", "the example forward does not call it") for name in traced.unused]
    findings += [
        Finding(
            spec.name,
            "float",
            "a rule excludes it",
        )
        for spec in traced.layers
        if spec.name not in planned
    ]
    for spec in traced.layers:
        if spec.calls > 1 and spec.name in planned:
            findings.append(
                Finding(spec.name, "note", f"one forward calls it {spec.calls} times; one weight and one input quantizer serve them all")
            )
    for names in owners.values():
        if len(names) > 1:
            findings.append(Finding(names[0], "note", f"it shares its weight, and so its quantizer, with {', '.join(names[1:])}"))
    findings += [
        Finding(piece.name, "float", f"{piece.operation}{f' x{piece.count}' if piece.count > 1 else ''}: {piece.reason}")
        for piece in traced.float_pieces
    ]
    return findings


def _layer_findings(name: str, layer: nn.Module, planned: bool) -> Iterable[Finding]:
    if not planned:
        return
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        yield Finding(name, "error", "its weight has no shape yet", "Run one float forward before preparing a lazy layer.")
    elif parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
        yield Finding(
            name,
            "error",
            "its weight is not a plain parameter (weight norm, spectral norm or another parametrization)",
            "Remove that first, for example with torch.nn.utils.parametrize.remove_parametrizations.",
        )
    elif not bool(torch.isfinite(layer.weight).all()):  # type: ignore[arg-type]
        yield Finding(name, "error", "its weight holds NaN or infinity", "Load a sound checkpoint.")
    elif not layer.weight.is_floating_point():  # type: ignore[operator]
        yield Finding(name, "error", "its weight is not of a floating-point type", "Convert the layer to float32.")
