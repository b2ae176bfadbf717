"""Convert a trained model with frozen bits into plain inference modules with integer weights."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import Phase
from nipq.distributed import SHARDING_WRAPPERS, inner, is_sharded, wrapped_in
from nipq.errors import NonFiniteError, NotQuantizableError, OrderError
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedOperand,
    DeployedProduct,
    DeployedWeightOnlyLayer,
    become_,
    deployed_layers,
)
from nipq.nn.integer import bias_of, fold
from nipq.nn.kinds import close_shortcuts_, is_plain, output_channels
from nipq.nn.layers import check_module, detach, float_weight
from nipq.nn.quantizer import TensorQuantizer
from nipq.nn.shells import kept_shell, plain_shell
from nipq.prepare.batches import ExampleInputs, call_model, copy_of, device_of, to_device
from nipq.prepare.layer_table import LayerRow, layer_table, quantizers, set_phase_, weight_table
from nipq.prepare.references import KEEP, way_to, with_state


def convert(model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A deep copy whose layers hold whole weight codes, with the batch norm after a layer folded into its scale.

    The codes are those of the trained model, bit for bit; folding changes the one multiply and the one add after the
    integer sums and nothing else. A batch norm is folded when it alone reads the layer's output and keeps running
    statistics; its place is taken by ``nn.Identity``. The result equals the trained model in phase ``"int"`` to the
    bit, and in phase ``"round"`` up to float rounding (see ``nipq.verify``). Layers whose input stays float get whole
    weights, too, but compute in floats, and their batch norm stays. Products inside attention, where they are
    quantized, multiply whole codes. A layer whose own forward does more than its operation keeps that forward, on its
    quantized input and a weight made of the codes. Hooks of the user's come along.

    Args:
        model: a prepared model whose bits are frozen; it is not changed. ``DistributedDataParallel``, ``DataParallel``,
            ``AveragedModel`` and ``torch.compile`` around it are left out.
        example_inputs: with them the copy runs once, and has to call every deployed layer and none of the model's own.

    Returns:
        The same tree with deployed layers, in evaluation mode, without gradients, not compiled.

    Raises:
        OrderError: if the model is not prepared or not calibrated, or a bit-width is still learned.
        NonFiniteError: if a weight, a bias or a batch norm holds NaN or infinity.
        NotQuantizableError: if a part of the model is wrapped or sharded, or a layer is reached past the model's
            modules.
    """
    model = bare_model(model, "convert")
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
    if example_inputs is not None:
        _check_calls(model, deployed, example_inputs)
    return deployed


@torch.no_grad()
def bare_model(model: nn.Module, command: str) -> nn.Module:
    """The model inside the wrappers around it, or the model itself, so that no name gets a prefix.

    Args:
        model: any model.
        command: in whose name it is refused.

    Raises:
        NotQuantizableError: if a part of the model is wrapped, or its parameters are spread over processes.
    """
    check_module(model, command)
    model = inner(model)
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        where = name or type(module).__name__
        if not kinds.isdisjoint(SHARDING_WRAPPERS) or any(map(is_sharded, module.parameters(recurse=False))):
            raise NotQuantizableError(
                f"{command}: {where}: expected whole parameters, found them sharded over processes. Load the full "
                "state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
                "into a model that is not sharded, prepared with the same config."
            )
        if wrapped_in(module) is not None:
            raise NotQuantizableError(
                f"{command}: {where}: expected parts of a model as they are, found one inside {type(module).__name__}. "
                "Take the wrapper off, or put it around the whole model."
            )
    return model


def _check_calls(model: nn.Module, deployed: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a deployed model once: it calls every deployed layer, and no layer of the trained model."""
    called: set[str] = set()
    reached: set[str] = set()
    own = with_state(model)
    with ExitStack() as stack:
        for name, layer in deployed_layers(deployed).items():
            stack.callback(layer.register_forward_pre_hook(partial(_note, called, name)).remove)
        for name, module in own.items():
            stack.callback(module.register_forward_pre_hook(partial(_note, reached, name)).remove)
        call_model(deployed, to_device(example_inputs, device_of(deployed)))
    if reached:
        names = [name for name in sorted(reached) if not any(name.startswith(f"{outer}.") for outer in reached)]
        ways = "; ".join(f"{name} {way_to(model, own[name])}" for name in names)
        raise NotQuantizableError(
            f"{', '.join(names)}: expected a deployed copy that runs its own layers, found that it calls those of the "
            f"trained model: {ways}. {KEEP}"
        )
    missed = [name for name in deployed_layers(deployed) if name not in called]
    if missed:
        raise NotQuantizableError(
            f"{', '.join(missed)}: expected a deployed model that calls every deployed layer, found that it does not "
            "call these. Give example inputs that reach them, or change the model's forward."
        )


def _note(names: set[str], name: str, *_call: object) -> None:
    names.add(name)


def deploy_copy(model: nn.Module) -> nn.Module:
    """:func:`convert` without its checks, at the whole bit-widths that evaluation uses now.

    Args:
        model: a prepared model; it is not changed.

    Returns:
        A deployed copy.
    """
    copied = copy_of(model)
    freeze_at_whole_bits_(copied)
    return deploy_(copied)


def freeze_at_whole_bits_(model: nn.Module) -> None:
    """Freeze every bit-width that is still learned at the whole one that evaluation uses now, with its grid.

    Args:
        model: a prepared model, a copy of the one in training.
    """
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(quantizer.bits_rounded)


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
    for module in model.modules():
        if vars(module).get("_compiled_call_impl") is not None:
            module._compiled_call_impl = None  # of the trained model
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
    common: dict[str, Any] = {
        "weight_bits": bits,
        "weight_grid": row.weight.grid.kind,
        "tied_to": tied_to,
        "dtype": float_weight(layer).dtype,
    }
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
