"""Set every quantizer's phase, or some quantizers' bit-widths, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from nipq.errors import ConfigError
from nipq.layer_table import LayerRow, layer_table
from nipq.nn.layers import enter_integer_domain, leave_integer_domain
from nipq.phases import Phase

#: Bit-widths of a layer: one number for weight and input, or each by its name.
LayerBits = int | Mapping[str, int]


def set_phase_(model: nn.Module, phase: Phase | str) -> None:
    """Choose what every quantizer does; see the table in :mod:`nipq.nn.quantizer`.

    In phase ``"int"`` every layer convolves whole codes and then applies one multiply and one add, with the batch norm
    after it folded in: the arithmetic of the deployed model, to the bit. Layers whose input stays float evaluate as in
    phase ``"round"``.

    Args:
        model: a prepared model.
        phase: ``"float"``, ``"noise"``, ``"round"`` or ``"int"``.

    Raises:
        ConfigError: if the phase is unknown.
        OrderError: if the model is not prepared.
    """
    try:
        phase = Phase(phase)
    except ValueError:
        names = ", ".join(repr(str(known)) for known in Phase)
        raise ConfigError(f"set_phase_: expected one of {names}, found {phase!r}.") from None
    for row in layer_table(model):
        leave_integer_domain(row.layer)
        if row.input is None:
            row.weight.phase = Phase.ROUND if phase is Phase.INT else phase
            continue
        row.weight.phase = row.input.phase = phase
        if phase is Phase.INT:
            name = row.spec.batchnorm
            enter_integer_domain(row.layer, None if name is None else model.get_submodule(name))


def set_bits_(model: nn.Module, bits: int | Mapping[str, LayerBits]) -> None:
    """Fix bit-widths by hand; fixed ones are no longer learned and the snap leaves them alone.

    Args:
        model: a prepared model.
        bits: one number for all layers, or glob pattern of layer names -> number, or -> ``{"weights": 4,
            "activations": 8}`` with either name. A bare number sets weight and input, except that the input of a layer
            which reads the model's own input keeps its bit-width; name ``"activations"`` to change that one too. Later
            patterns win.

    Raises:
        ConfigError: if a pattern matches no layer, a name is unknown, or a bit-width is not from 2 to 16.
        OrderError: if the model is not prepared.
    """
    rows = layer_table(model)
    patterns: Mapping[str, LayerBits] = {"*": bits} if isinstance(bits, int) else bits
    for pattern, choice in patterns.items():
        matched = [row for row in rows if fnmatchcase(row.name, pattern)]
        if not matched:
            raise ConfigError(
                f"set_bits_: expected {pattern!r} to match a layer, found none. "
                f"Layers are {', '.join(row.name for row in rows[:5])}{', ...' if len(rows) > 5 else ''}."
            )
        for row in matched:
            _set_row(row, choice)


def _set_row(row: LayerRow, choice: LayerBits) -> None:
    if isinstance(choice, int):
        row.weight.freeze_bits_(choice)
        if row.input is not None and not row.spec.is_input:
            row.input.freeze_bits_(choice)
        return
    unknown = set(choice) - {"weights", "activations"}
    if unknown:
        raise ConfigError(f"{row.name}: expected the names 'weights' and 'activations', found {sorted(unknown)}.")
    if "weights" in choice:
        row.weight.freeze_bits_(choice["weights"])
    if "activations" in choice:
        if row.input is None:
            raise ConfigError(f"{row.name}: its input stays float, so it has no activation bits to set.")
        row.input.freeze_bits_(choice["activations"])
