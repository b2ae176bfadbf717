"""Table of a prepared model's layers with their quantizers, and settings of these: phase, bit-widths, noise.

Losses, budgets, freezing, reports and file sizes all read the rows of this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.config import Phase
from nipq.distributed import part
from nipq.errors import ConfigError, NonFiniteError, OrderError
from nipq.functional.clipping import LEAST_RANGE
from nipq.nn.layers import (
    LayerSpec,
    check_module,
    enter_integer_domain,
    is_prepared,
    leave_integer_domain,
    quantization,
    weight_quantizer,
)
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer, WeightQuantizer

#: Bit-widths of a layer: one number for weight and input, or each by its name.
LayerBits = int | Mapping[str, int]
#: Names of a product's operands in deployed models.
OPERANDS = ("x", "y")


@dataclass(frozen=True)
class LayerRow:
    """A prepared layer, its facts and its quantizers.

    Attributes:
        spec: counts per sample and the batch norm that can be folded.
        layer: the module itself.
        weight: quantizer of its weight; the same object for layers that share a weight. Of a product inside attention,
            quantizer of the second operand (key, value), which stands for a weight.
        input: quantizer of its input, or None when the input stays float.
        batchnorm: the batch norm that can be folded into it, as it is in the model now, or None.
    """

    spec: LayerSpec
    layer: nn.Module
    weight: TensorQuantizer
    input: InputQuantizer | None
    batchnorm: nn.Module | None = None

    @property
    def name(self) -> str:
        """Full name of the layer in the model."""
        return self.spec.name


def layer_table(model: nn.Module) -> list[LayerRow]:
    """Rows of a prepared model, in the order in which its layers run.

    Args:
        model: a model that ``prepare_`` has changed, a wrapper around one (names then differ by a prefix), or a part.

    Returns:
        One row per prepared layer.

    Raises:
        OrderError: if the model holds no prepared layer.
    """
    check_module(model)
    modules = dict(model.named_modules())
    layers = [(name, layer) for name, layer in modules.items() if is_prepared(layer)]
    if not layers:
        raise OrderError(
            f"{type(model).__name__}: expected a prepared model, found no quantizer. "
            "Call nipq.prepare_(model, example_inputs) first."
        )
    _check_names(layers)
    rows = []
    for name, layer in sorted(layers, key=lambda item: quantization(item[1]).order):
        record = quantization(layer)
        batchnorm = modules.get(_present_name(record.spec, name)) if record.spec.batchnorm else None
        rows.append(LayerRow(record.spec, layer, weight_quantizer(layer), record.input, batchnorm))
    return rows


def _check_names(layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse copies of a prepared layer beside it: bit-widths and costs go by names."""
    found: dict[str, str] = {}
    for path, layer in layers:
        name = quantization(layer).spec.name
        first = found.setdefault(name, path)
        if first != path:
            raise OrderError(
                f"{name}: expected one prepared layer of that name, found {first!r} and {path!r}, such as a copy that "
                "an adapter or an average keeps. Prepare the model after the copy was made, or give the part without "
                "it."
            )


def weight_table(model: nn.Module) -> list[tuple[LayerRow, WeightQuantizer]]:
    """Rows of :func:`layer_table` whose weight is stored, with its quantizer: all but products inside attention."""
    rows = layer_table(model)
    return [(row, row.weight) for row in rows if isinstance(row.weight, WeightQuantizer)]


def input_quantizers(rows: Sequence[LayerRow]) -> list[InputQuantizer]:
    """Quantizers of computed tensors, of layers' inputs and of keys and values, from rows of :func:`layer_table`."""
    operands = [quantizer for row in rows for quantizer in (row.input, row.weight)]
    return [quantizer for quantizer in operands if isinstance(quantizer, InputQuantizer)]


def _present_name(spec: LayerSpec, name: str) -> str:
    """Name of the layer's batch norm inside a model that calls the layer ``name``, be it a wrapper or a part."""
    assert spec.batchnorm is not None
    if name.endswith(spec.name):
        return name.removesuffix(spec.name) + spec.batchnorm
    return spec.batchnorm.removeprefix(spec.name.removesuffix(name))


def quantizers(model: nn.Module) -> list[TensorQuantizer]:
    """Every quantizer of a prepared model once (tied weights share one): of each layer the weight's, then the input's.

    Raises:
        OrderError: if the model holds no prepared layer.
    """
    found: dict[TensorQuantizer, None] = {}
    for row in layer_table(model):
        found[row.weight] = None
        if row.input is not None:
            found[row.input] = None
    return list(found)


def set_phase_(model: nn.Module, phase: Phase | str) -> None:
    """Set the phase of every quantizer: float, noise, rounding or integers; see :mod:`nipq.nn.quantizer`.

    In phase ``"int"`` every layer convolves whole codes and then applies one multiply and one add, with the batch norm
    after it folded in: the arithmetic of the deployed model, to the bit. Layers whose input stays float, and those
    whose forward does more than their operation, evaluate as in phase ``"round"``.

    Args:
        model: a prepared model.
        phase: ``"float"``, ``"noise"``, ``"round"`` or ``"int"``.

    Raises:
        ConfigError: if the phase is unknown.
        OrderError: if the model is not prepared.

    Example:
        >>> import torch
        >>> from nipq.prepare.prepare import prepare_
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
            row.weight.phase = Phase.ROUND  # for whoever reads the weight; the layer takes whole codes by itself
            if row.input is not None and row.spec.form != "kept":
                enter_integer_domain(row.layer, row.batchnorm)
            elif row.input is not None:
                row.input.phase = Phase.ROUND


def phase_of(model: nn.Module) -> Phase:
    """The phase that :func:`set_phase_` chose last.

    Raises:
        OrderError: if the model is not prepared.
    """
    rows = layer_table(model)
    # A layer that computes in floats evaluates as in phase "round" while the others are in phase "int".
    phases = [row.input.phase for row in rows if row.input is not None] or [rows[0].weight.phase]
    return Phase.INT if Phase.INT in phases else phases[0]


def set_noise_mix_(model: nn.Module, share: float) -> None:
    """Set the share of the true rounding error in the noise: 0 is the noise proxy, 1 the true quantizer.

    eps_t = (1 - share) eps + share e in every quantizer, for methods with noise. Raised from 0 to 1 over the
    search it leads from pseudo-quantization to quantization without a jump.

    Paper: not in it; "noise tempering" (arXiv 2212.05603).

    Args:
        model: a prepared model.
        share: 0 to 1.

    Raises:
        ConfigError: if the share is out of range.
        OrderError: if the model is not prepared.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"set_noise_mix_: expected a share from 0 to 1, found {share}. Give the share of the true error."
        )
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
    """Fix bit-widths by hand; fixed ones are no longer learned, and freezing leaves them alone.

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
    """Bit-widths that a bare number sets, by name."""
    weights = {} if row.spec.is_table else {"weights": bits}
    return weights if row.input is None or row.spec.is_input else weights | {"activations": bits}


def check_finite(model: nn.Module, where: str = "") -> None:
    """Refuse NaN and infinity in the parameters and batch-norm statistics of a model, and clipping ranges of nearly 0.

    Args:
        model: any model; of sharded parameters each rank looks at its part.
        where: what to put before the message.

    Raises:
        NonFiniteError: naming the first tensor.
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            tensors |= {f"{name}.running_mean": module.running_mean, f"{name}.running_var": module.running_var}
    flags = {name: _is_sound(name, part(tensor.detach())) for name, tensor in tensors.items()}
    devices = {flag.device for flag in flags.values()}
    found = (torch.stack([flag for flag in flags.values() if flag.device == device]) for device in devices)
    if all(bool(flag.all()) for flag in found):
        return
    name = next(name for name, flag in flags.items() if not flag)
    if bool(torch.isfinite(part(tensors[name].detach())).all()):
        raise NonFiniteError(
            f"{where}{name.removesuffix('_raw')}: expected a clipping range of at least {LEAST_RANGE:g}, found one "
            "that training has driven to 0. The tensor is dead (all 0), or the learning rate of ranges too high: "
            "lower range_lr, or leave the layer float by a rule."
        )
    raise NonFiniteError(
        f"{where}{name.replace('parametrizations.weight.original', 'weight')}: expected finite numbers, found NaN or "
        "infinity. The training has diverged, or a sample holds such numbers: look at the loss and the data, go back "
        "to a state from before, and lower the learning rate."
    )


def _is_sound(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return whether numbers are finite, and clipping ranges such that float32 holds quotients by their steps."""
    sound = torch.isfinite(tensor)
    if name.endswith("alpha_raw"):
        sound &= tensor >= math.log(LEAST_RANGE) - 1  # raw is log(alpha) there, of which start ranges keep a margin
    return sound.all()


def operand_point(product: str, operand: str) -> str:
    """Name of a product's operand, one of :data:`OPERANDS`, as a quantization point in comparisons and messages.

    Example:
        >>> operand_point("layer.attention_products.mix", "y")
        'layer.attention_products.mix: y'
    """
    return f"{product}: {operand}"


def quantizers_at(name: str, row: LayerRow) -> dict[str, InputQuantizer]:
    """Quantizers of the inputs of a trained layer or product, by quantization point; empty when the input is float."""
    if row.input is None:
        return {}
    if not isinstance(row.weight, InputQuantizer):
        return {name: row.input}
    return {
        operand_point(name, operand): found for operand, found in zip(OPERANDS, (row.input, row.weight), strict=True)
    }


def quantization_points(rows: Mapping[str, LayerRow]) -> list[str]:
    """Names of all inputs, layers and products that are compared, in the order of execution.

    The input of a layer has the layer's name; a product follows its operands.
    """
    return list(dict.fromkeys(point for name, row in rows.items() for point in (*quantizers_at(name, row), name)))
