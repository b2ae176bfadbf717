"""From a trained model with frozen bits to plain inference modules with integer weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nipq.control import set_phase_
from nipq.deploy.modules import Deployed, DeployedLayer, DeployedWeightOnlyLayer, replace_modules
from nipq.errors import OrderError
from nipq.layer_table import LayerRow, layer_table, quantizers
from nipq.nn.integer import fold, output_channels
from nipq.nn.layers import plain_shell
from nipq.phases import Phase


def convert(model: nn.Module) -> nn.Module:
    """A deep copy whose layers hold whole weight codes, with the batch norm after a layer folded into its scale.

    The codes are those of the trained model, bit for bit; folding changes the one multiply and the one add after the
    integer sums and nothing else. A batch norm is folded when it alone reads the layer's output and keeps running
    statistics; its place is taken by ``nn.Identity``. The result equals the trained model in phase ``"int"`` to the bit,
    and in phase ``"round"`` up to float rounding (see ``nipq.verify``).

    Args:
        model: a prepared model whose bits are frozen; it is not changed.

    Returns:
        The same tree with deployed layers, in evaluation mode, without gradients.

    Raises:
        OrderError: if the model is not prepared, a bit-width is still learned, or a boundary was never set.
    """
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a frozen bit-width, found one that is still learned. "
                "Call nipq.freeze_bits_(model, budget) before nipq.convert."
            )
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated boundary, found none. Call nipq.calibrate_(model, loader)."
            )
    return deploy_copy(model)


@torch.no_grad()
def deploy_copy(model: nn.Module) -> nn.Module:
    """:func:`convert` without its checks, at the whole bit-widths that evaluation uses now.

    Args:
        model: a prepared model; it is not changed.

    Returns:
        A deployed copy.
    """
    twin = copy.deepcopy(model)
    set_phase_(twin, Phase.ROUND)
    replacements: dict[nn.Module, nn.Module] = {}
    shared: dict[nn.Module, torch.Tensor] = {}
    for row in layer_table(twin):
        replacements[row.layer] = _deployed(row, twin, shared)
        if row.input is not None and row.spec.batchnorm is not None:
            replacements[twin.get_submodule(row.spec.batchnorm)] = nn.Identity()
    return replace_modules(twin, replacements).eval().requires_grad_(False)


def _deployed(row: LayerRow, model: nn.Module, shared: dict[nn.Module, torch.Tensor]) -> Deployed:
    bits = row.weight.bits_rounded
    if row.weight not in shared:  # tied weights stay one tensor
        original: torch.Tensor = row.layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        shared[row.weight] = row.weight.codes(original).to(torch.int8 if bits <= 8 else torch.int16)
    codes, step, shell = shared[row.weight], row.weight.step(), plain_shell(row.layer)
    bias = row.layer.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    if row.input is None:
        return DeployedWeightOnlyLayer(
            shell, codes, step.clone(), None if bias is None else bias.detach().clone(), weight_bits=bits
        )
    name = row.spec.batchnorm
    batchnorm = None if name is None else model.get_submodule(name)
    scale, offset = fold(row.input.step(), step, bias, batchnorm, output_channels(row.layer))
    low, high = row.input.code_range()
    return DeployedLayer(
        shell,
        codes,
        scale,
        offset,
        row.input.step().clone(),
        weight_bits=bits,
        input_bits=row.input.bits_rounded,
        grid=row.input.grid.kind,
        zero_point=int(row.input.zero_point()),
        code_range=(int(low), int(high)),
        batchnorm=name,
    )
