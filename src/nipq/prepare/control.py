"""Set every quantizer's phase, or some quantizers' bit-widths, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from nipq.errors import ConfigError
from nipq.nn.layers import enter_integer_domain, leave_integer_domain
from nipq.phases import Phase
from nipq.prepare.layer_table import LayerRow, layer_table, quantizers

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

    Example:
        >>> import torch
        >>> from nipq.prepare import prepare_
        >>> model = prepare_(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
        >>> set_phase_(model, "float")
        >>> phase_of(model)
        <Phase.FLOAT: 'float'>
    """
    try:
        phase = Phase(phase)
    except ValueError:
        names = ", ".join(repr(str(known)) for known in Phase)
        raise ConfigError(f"set_phase_: expected a phase, found {phase!r}. Choose one of {names}.") from None
    rows = layer_table(model)
    for row in rows:
        leave_integer_domain(row.layer)
        row.weight.phase = phase
        if row.input is not None:
            row.input.phase = phase
    if phase is Phase.INT:
        for row in rows:
            if row.spec.is_product:
                continue  # it multiplies codes by itself
            if row.input is None:
                row.weight.phase = Phase.ROUND  # whole codes of the weight alone would have no scale
            else:
                enter_integer_domain(row.layer, row.batchnorm)


def phase_of(model: nn.Module) -> Phase:
    """The phase that :func:`set_phase_` chose last.

    Args:
        model: a prepared model.

    Returns:
        The phase of the quantizers.

    Raises:
        OrderError: if the model is not prepared.
    """
    rows = layer_table(model)
    # A layer whose input stays float evaluates as in phase "round" while the others are in phase "int".
    return next((row.input.phase for row in rows if row.input is not None), rows[0].weight.phase)


def temper_(model: nn.Module, share: float) -> None:
    """Set the share of the true rounding error in the noise: 0 is the noise proxy, 1 the true quantizer.

    eps_t = (1 - share) eps + share e in every quantizer, for methods with noise. Raised from 0 to 1 in the course of
    training it leads from pseudo-quantization to quantization without a jump.

    Paper: not in it; noise tempering (arXiv 2212.05603).

    Args:
        model: a prepared model.
        share: 0 to 1.

    Raises:
        ConfigError: if the share is out of range.
        OrderError: if the model is not prepared.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"temper_: expected a share from 0 to 1, found {share}. Give the share of the true error.")
    for quantizer in quantizers(model):
        if share == 0:  # the kernels know the noise proxy alone
            quantizer.error_share = None
            continue
        if quantizer.error_share is None:
            quantizer.register_buffer(
                "error_share", torch.zeros(1, device=quantizer.alpha_raw.device), persistent=False
            )
        assert quantizer.error_share is not None
        quantizer.error_share.fill_(share)


def set_bits_(model: nn.Module, bits: int | Mapping[str, LayerBits]) -> None:
    """Fix bit-widths by hand; fixed ones are no longer learned and the snap leaves them alone.

    Args:
        model: a prepared model.
        bits: one number for all layers, or glob pattern of layer names -> number, or -> ``{"weights": 4,
            "activations": 8}`` with either name. A bare number sets weight and input, except that the input of a layer
            which reads the model's own input keeps its bit-width, and so does an embedding table that no layer
            multiplies with; give ``"activations"`` or ``"weights"`` by name to change them, too. The operands of an
            attention's products are activations. Later patterns win.

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
                f"Correct it; layers are {', '.join(row.name for row in rows[:5])}{', ...' if len(rows) > 5 else ''}."
            )
        for row in matched:
            _set_row(row, choice)


def _set_row(row: LayerRow, choice: LayerBits) -> None:
    choice = _by_name(row, choice) if isinstance(choice, int) else choice
    unknown = set(choice) - {"weights", "activations"}
    if unknown:
        raise ConfigError(
            f"{row.name}: expected the names 'weights' and 'activations', found {sorted(unknown)}. Correct them."
        )
    if "weights" in choice and not row.spec.is_product:
        row.weight.freeze_bits_(choice["weights"])
    if "activations" in choice:
        if row.input is None:
            raise ConfigError(
                f"{row.name}: expected a quantized input, found one that stays float. "
                "Leave 'activations' out, or prepare the model with that input quantized."
            )
        row.input.freeze_bits_(choice["activations"])
        if row.spec.is_product:  # both operands are activations
            row.weight.freeze_bits_(choice["activations"])


def _by_name(row: LayerRow, bits: int) -> dict[str, int]:
    """What a bare number sets."""
    weights = {} if row.spec.is_table else {"weights": bits}
    return weights if row.input is None or row.spec.is_input else weights | {"activations": bits}
