"""Convert a trained model with frozen bits into plain inference modules with integer weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.errors import NonFiniteError, OrderError
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedOperand,
    DeployedProduct,
    DeployedWeightOnlyLayer,
    become_,
    deployed_layers,
    kept_shell,
    plain_shell,
)
from nipq.nn.integer import bias_of, fold
from nipq.nn.kinds import close_shortcuts_, is_plain, output_channels
from nipq.nn.layers import detach, float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.batches import copy_of
from nipq.prepare.layer_table import LayerRow, layer_table, quantizers, set_phase_, weight_table


def convert(model: nn.Module) -> nn.Module:
    """A deep copy whose layers hold whole weight codes, with the batch norm after a layer folded into its scale.

    The codes are those of the trained model, bit for bit; folding changes the one multiply and the one add after the
    integer sums and nothing else. A batch norm is folded when it alone reads the layer's output and keeps running
    statistics; its place is taken by ``nn.Identity``. The result equals the trained model in phase ``"int"`` to the
    bit, and in phase ``"round"`` up to float rounding (see ``nipq.verify``). Layers whose input stays float get whole
    weights, too, but compute in floats, and their batch norm stays. Products inside attention, where they are
    quantized, multiply whole codes. Hooks on a layer do not come along.

    Args:
        model: a prepared model whose bits are frozen; it is not changed.

    Returns:
        The same tree with deployed layers, in evaluation mode, without gradients.

    Raises:
        OrderError: if the model is not prepared or not calibrated, or a bit-width is still learned.
        NonFiniteError: if a weight, a bias or a batch norm holds NaN or infinity.
    """
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a frozen bit-width, found one that is still learned. "
                "Call nipq.freeze_bits_(model, budget) before nipq.convert."
            )
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated clipping range, found none. "
                "Call nipq.calibrate_(model, loader)."
            )
    for row, weight in weight_table(model):
        _check_finite(weight.name, float_weight(row.layer).detach())
    deployed = deploy_copy(model)
    for name, layer in deployed_layers(deployed).items():
        for part in (layer.scale, layer.offset):
            if part is not None:
                _check_finite(f"{name} with its bias and batch norm", part)
    return deployed


def deploy_copy(model: nn.Module) -> nn.Module:
    """:func:`convert` without its checks, at the whole bit-widths that evaluation uses now.

    Args:
        model: a prepared model; it is not changed.

    Returns:
        A deployed copy.
    """
    return deploy_(copy_of(model))


@torch.no_grad()
def deploy_(model: nn.Module) -> nn.Module:
    """Turn the layers of a prepared model into their deployed form, in place.

    Every layer becomes its deployed form under all the names and references that it has; hooks of the user's stay.

    Args:
        model: a prepared model, not to be trained any more.

    Returns:
        The same model, in evaluation mode, without gradients.
    """
    set_phase_(model, Phase.ROUND)
    names = {module: name for name, module in model.named_modules()}
    rows = layer_table(model)
    owners: dict[nn.Module, LayerRow] = {}
    batchnorms: dict[nn.Module, nn.Module | None] = {}
    codes: dict[nn.Module, Tensor] = {}
    for row in rows:
        if row.spec.is_product:
            continue
        row.weight.follow_(float_weight(row.layer))  # which may have moved since the last forward
        owner = owners.setdefault(row.weight, row)
        codes[row.layer] = _codes(row) if owner is row else codes[owner.layer]
        batchnorms[row.layer] = row.batchnorm if row.input is not None and row.spec.form != "kept" else None
    for row in rows:
        if row.spec.is_product:
            become_(row.layer, _product(row))
            continue
        detach(row.layer)
        owner = owners[row.weight]
        tied_to = None if owner is row else names[owner.layer]
        batchnorm = batchnorms[row.layer]
        become_(row.layer, _deployed(row, codes[row.layer], tied_to, batchnorm, names.get(batchnorm)))
    for batchnorm in batchnorms.values():
        if batchnorm is not None:
            become_(batchnorm, nn.Identity())
    close_shortcuts_(model)
    return model.eval().requires_grad_(False)


def _deployed(
    row: LayerRow, codes: Tensor, tied_to: str | None, batchnorm: nn.Module | None, folded: str | None
) -> Deployed:
    """The deployed form of a layer whose quantizers are detached already."""
    layer, step, bits = row.layer, row.weight.step(), row.weight.bits_rounded
    common: dict[str, Any] = {"weight_bits": bits, "tied_to": tied_to, "dtype": float_weight(layer).dtype}
    inputs: dict[str, Any] = {}
    if row.input is not None:
        low, high = row.input.code_range()
        inputs = {
            "input_bits": row.input.bits_rounded,
            "grid": row.input.grid.kind,
            "zero_point": int(row.input.zero_point()),
            "code_range": (int(low), int(high)),
        }
    input_step = None if row.input is None else row.input.step()
    if row.spec.form == "kept" or (input_step is None and not is_plain(layer)):
        return DeployedKeptLayer(kept_shell(layer), codes, step, input_step, **common, **inputs)
    bias = bias_of(layer)
    if input_step is None:
        kept = None if bias is None else bias.detach().clone()
        return DeployedWeightOnlyLayer(plain_shell(layer), codes, step, kept, **common)
    scale, offset = fold(input_step, step, bias, batchnorm, output_channels(layer))
    return DeployedLayer(
        plain_shell(layer),
        codes,
        scale,
        offset,
        input_step,
        batchnorm=folded,
        has_bias=bias is not None,
        **common,
        **inputs,
    )


def _product(row: LayerRow) -> DeployedProduct:
    assert row.input is not None
    return DeployedProduct(row.name, _operand(row.input), _operand(row.weight))


def _operand(quantizer: TensorQuantizer) -> DeployedOperand:
    low, high = quantizer.code_range()
    return DeployedOperand(
        quantizer.step(),
        bits=quantizer.bits_rounded,
        grid=quantizer.grid.kind,
        zero_point=int(quantizer.zero_point()),
        code_range=(int(low), int(high)),
    )


def _codes(row: LayerRow) -> Tensor:
    dtype = torch.int8 if row.weight.bits_rounded <= 8 else torch.int16
    return row.weight.codes(float_weight(row.layer).detach()).to(dtype)


def _check_finite(what: str, numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise NonFiniteError(
            f"{what}: expected finite numbers, found NaN or infinity. "
            "Go back to a state from before the training diverged."
        )
