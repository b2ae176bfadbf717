"""Check a float model before it is prepared: refusals, what stays float, and notes, each by the module's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from nipq.config import Config
from nipq.errors import Diagnostic, NotQuantizableError, first_line
from nipq.prepare.batches import ExampleInputs, copy_of
from nipq.prepare.findings import before_running, examined
from nipq.prepare.prepare import attach_quantizers_
from nipq.prepare.trace import trace


def validate(model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None) -> list[Diagnostic]:
    """List everything that ``prepare_`` would refuse, leave float, or do in a way worth knowing; changes nothing.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: as for :func:`prepare_`.

    Returns:
        Findings, refusals first. A model that must not even be run (see ``prepare_``) has refusals only.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs.
        ConfigError: if a rule matches no layer, or rules ask for two things of one weight.
    """
    return try_preparing(model, example_inputs, config)[0]


def try_preparing(
    model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None
) -> tuple[list[Diagnostic], nn.Module | None]:
    """:func:`validate`, and the copy of the model that it prepared.

    Args:
        model: a float model; it is not changed.
        example_inputs: as for :func:`prepare_`.
        config: as for :func:`prepare_`.

    Returns:
        Findings; and a prepared copy that shares the float parameters, or None if there are refusals or nothing is left
        to quantize.
    """
    refusals = list(before_running(model))
    if refusals:
        return refusals, None
    config = config or Config()
    traced, findings = examined(model, trace(model, example_inputs), config)
    prepared = None
    if not any(finding.severity == "error" for finding in findings):
        try:
            clone = copy_of(model, {id(parameter): parameter for parameter in model.parameters()})
        except Exception as error:  # whatever the model holds
            reason = f"it cannot be copied, as converting it will need ({type(error).__name__}: {first_line(error)})"
            findings.append(Diagnostic("", "error", reason, "Take what cannot be copied out of the model."))
        else:
            try:
                with _never_called(model, [spec.name for spec in traced.layers]):
                    prepared = attach_quantizers_(clone, example_inputs, config, traced)
            except NotQuantizableError as error:
                findings += error.diagnostics
    order = {"error": 0, "float": 1, "note": 2}
    return sorted(findings, key=lambda finding: order[finding.severity]), prepared


@contextmanager
def _never_called(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Refuse calls of a model's layers, by their names, while a copy of it is prepared."""

    def refuse(name: str, *_call: object) -> None:
        reason = "a copy of the model still calls the layer of the model itself, through a closure or a global name"
        found = Diagnostic(name, "error", reason, "Call it as an attribute of a module.")
        raise NotQuantizableError(str(found), [found])

    with ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(partial(refuse, name), with_kwargs=True).remove)
        yield
