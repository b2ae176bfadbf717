"""Convert a trained model with frozen bits into plain inference modules with integer weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.errors import NonFiniteError, OrderError
from nipq.nn.deployed import (
    Deployed,
    DeployedLayer,
    DeployedOperand,
    DeployedProduct,
    DeployedWeightOnlyLayer,
    deployed_layers,
    replace_modules,
)
from nipq.nn.integer import bias_of, fold
from nipq.nn.kinds import output_channels
from nipq.nn.layers import float_weight, plain_shell, quantization
from nipq.nn.quantizer import TensorQuantizer
from nipq.nn.relu import unfold_relu
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


@torch.no_grad()
def deploy_copy(model: nn.Module) -> nn.Module:
    """:func:`convert` without its checks, at the whole bit-widths that evaluation uses now.

    Args:
        model: a prepared model; it is not changed.

    Returns:
        A deployed copy.
    """
    clone = copy.deepcopy(model)
    set_phase_(clone, Phase.ROUND)
    names = {module: name for name, module in clone.named_modules()}
    owners: dict[nn.Module, nn.Module] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for row in layer_table(clone):
        if row.spec.is_product:
            replacements[row.layer] = _product(row)
            continue
        for relu in quantization(row.layer).relu:
            unfold_relu(relu)
        owner = owners.setdefault(row.weight, row.layer)
        tied_to = None if owner is row.layer else names[owner]
        codes = _codes(row) if tied_to is None else replacements[owner].weight_codes
        assert isinstance(codes, Tensor)
        batchnorm = None if row.batchnorm is None or row.input is None else names[row.batchnorm]
        replacements[row.layer] = _deployed(row, codes, tied_to, batchnorm)
        if batchnorm is not None and row.batchnorm is not None:
            replacements[row.batchnorm] = nn.Identity()
    return replace_modules(clone, replacements).eval().requires_grad_(False)


def _deployed(row: LayerRow, codes: Tensor, tied_to: str | None, batchnorm: str | None) -> Deployed:
    bits, step, shell, bias = row.weight.bits_rounded, row.weight.step(), plain_shell(row.layer), bias_of(row.layer)
    if row.input is None:
        kept = None if bias is None else bias.detach().clone()
        return DeployedWeightOnlyLayer(shell, codes, step, kept, weight_bits=bits, tied_to=tied_to)
    folded = row.batchnorm if batchnorm is not None else None
    scale, offset = fold(row.input.step(), step, bias, folded, output_channels(row.layer))
    low, high = row.input.code_range()
    return DeployedLayer(
        shell,
        codes,
        scale,
        offset,
        row.input.step(),
        weight_bits=bits,
        input_bits=row.input.bits_rounded,
        grid=row.input.grid.kind,
        zero_point=int(row.input.zero_point()),
        code_range=(int(low), int(high)),
        batchnorm=batchnorm,
        tied_to=tied_to,
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
