"""Rehearse the deployment of a freshly prepared model, so that what would go wrong is refused before it is trained.

A copy that shares the float weights gets clipping ranges from the example inputs, is deployed, and is compared with a
second copy that rounds as the trained model will, layer by layer under teacher forcing and in all that the model
returns; so nothing is deployed, after training, that was not seen to compute what was trained. What this cannot see are
ways through the model that the example inputs do not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nipq.config import Phase
from nipq.errors import Diagnostic, NipqError, NotQuantizableError, first_line
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.batches import ExampleInputs, call_model, copy_of, device_of, evaluating, map_tensors, to_device
from nipq.prepare.convert import deploy_, freeze_at_whole_bits_
from nipq.prepare.layer_table import input_quantizers, layer_table, quantizers, set_phase_
from nipq.prepare.references import KEEP, way_to, with_state
from nipq.prepare.teacher_forcing import (
    RESULTS,
    LayerComparison,
    float_results,
    recording,
    run_teacher_forced,
)

#: Times the limits of ``nipq.verify`` within which a rehearsal passes: it has one batch, and no range was learned.
SLACK = 10
#: Share of codes that may flip between layers.
MOST_FLIPS = 0.02


class _Reached(Exception):  # noqa: N818  (never seen by anyone)
    """A layer of the model itself was called while its copy ran."""


@torch.no_grad()
def rehearse(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Deploy a copy of a freshly prepared model and compare it with the model that would be trained.

    Needs memory for a quarter of the weights, and four forwards. The model, its random state and its modes stay as
    they are.

    Args:
        model: a prepared model, not trained yet.
        example_inputs: as for ``prepare_``. Floating tensors that hold one value throughout are filled with random
            numbers if the model gives finite results on those.

    Raises:
        NotQuantizableError: if the copies differ, a deployed layer is not called, or a copy calls a layer of the model
            itself; names the layer.
    """
    own = with_state(model)
    remedy = "Leave such layers float with Rule(name, quantize=False), or change the model's forward."
    with ExitStack() as stack:
        for name, layer in own.items():
            hook = partial(_refuse_call, name)
            stack.callback(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        try:
            faults = list(_faults(_copy(model), to_device(example_inputs, device_of(model))))
        except _Reached as reached:
            name = str(reached)
            way, remedy = way_to(model, own[name]), KEEP
            faults = [f"{name}: a copy of the model still calls the layer of the model itself, {way}"]
        except NipqError as error:
            faults = [str(error)]
        except Exception as error:
            faults = [f"{type(model).__name__}: a deployed copy of the model does not run: {first_line(error)}"]
    if faults:
        parts = (fault.partition(": ") for fault in faults)
        diagnostics = [Diagnostic(name, "error", reason, remedy) for name, _, reason in parts]
        lines = "\n".join((*faults, remedy))
        raise NotQuantizableError(
            f"expected a model whose deployed form computes what is trained, found\n{lines}", diagnostics
        )


def _named_rows(model: nn.Module) -> dict[str, Any]:
    names = {module: name for name, module in model.named_modules()}
    return {names[row.layer]: row for row in layer_table(model)}


def _refuse_call(name: str, *_call: object) -> None:
    raise _Reached(name)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    device = device_of(model)
    return [device] if device.type == "cuda" else []


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters share their memory with the model's, but for those of quantizers."""
    own = {id(parameter) for quantizer in quantizers(model) for parameter in quantizer.parameters()}
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
        if id(parameter) not in own
    }
    clone = copy_of(model, shared)
    for module in clone.modules():
        if isinstance(module, _BatchNorm):
            _train_(module)
    for module in clone.modules():  # what watches the model's own layers must not come along
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and hook.func is _refuse_call:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return clone


def _train_(batchnorm: _BatchNorm) -> None:
    """Give a batch norm other numbers: a fresh one changes nothing, so that a wrongly folded one would not show."""
    if batchnorm.running_mean is not None and batchnorm.running_var is not None:
        spread = batchnorm.running_var.sqrt()
        batchnorm.running_mean = batchnorm.running_mean + 0.5 * spread * torch.randn_like(spread)
        batchnorm.running_var = batchnorm.running_var * (0.5 + torch.rand_like(spread))
    if batchnorm.affine:
        weight = batchnorm.weight * (0.5 + torch.rand_like(batchnorm.weight))
        batchnorm.weight = nn.Parameter(weight, requires_grad=False)
        bias = batchnorm.bias + 0.2 * torch.randn_like(batchnorm.bias)
        batchnorm.bias = nn.Parameter(bias, requires_grad=False)


def _faults(trained: nn.Module, example_inputs: ExampleInputs) -> Iterator[str]:
    """Compare a copy of the model with what it becomes when it is deployed."""
    with evaluating(trained):
        inputs = _calibrate_(trained, example_inputs)
        freeze_at_whole_bits_(trained)  # balanced weights of 8 bits or more are symmetric from then on
        rows = _named_rows(trained)
        set_phase_(trained, Phase.ROUND)
        with recording(rows) as calls:
            output = call_model(trained, map_tensors(torch.clone, inputs))
        calls.results = [tensor.clone() for tensor in float_results(output)]
        layers: dict[str, LayerComparison] = {}
        deployed = deploy_(trained)
        run_teacher_forced(
            deployed, calls, layers, lambda network: call_model(network, map_tensors(torch.clone, inputs))
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in calls.results):
        layers.pop(RESULTS, None)  # the model's own affair
    for name, layer in layers.items():
        if (fault := _fault(layer)) is not None:
            yield f"{name}: {fault}"
            if name != RESULTS:
                return  # those after it may follow from it


def _fault(layer: LayerComparison) -> str | None:
    if layer.calls_differ:
        return "the deployed model calls it differently often, or on other shapes, or not at all"
    if layer.wrong:
        return f"{layer.wrong:,} of {layer.codes:,} codes of the same input differ"
    most = max(SLACK, MOST_FLIPS * layer.codes, layer.allowed * layer.codes)
    if not (layer.flips <= most and layer.jump <= layer.longest_jump):
        return f"{layer.flips:,} of {layer.codes:,} codes of its input differ, by up to {layer.jump:g} levels"
    layer.tolerance *= SLACK
    return layer.output_fault()


def _calibrate_(model: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Set provisional clipping ranges from the largest values; returns the inputs that they were found on."""
    set_phase_(model, Phase.FLOAT)
    ends: dict[InputQuantizer, tuple[float, float]] = {}
    inputs = example_inputs
    for inputs in (map_tensors(_random, example_inputs), example_inputs):
        ends.clear()
        with ExitStack() as stack:
            for quantizer in input_quantizers(layer_table(model)):
                stack.callback(quantizer.register_forward_pre_hook(partial(_widen, ends)).remove)
            try:
                results = float_results(call_model(model, map_tensors(torch.clone, inputs)))
            except _Reached:
                raise
            except Exception:
                if inputs is example_inputs:
                    raise
                continue
        if all(bool(torch.isfinite(tensor).all()) for tensor in results):
            break
    for quantizer in input_quantizers(layer_table(model)):
        low, high = ends.get(quantizer, (0.0, 1.0))  # no row may have reached it
        largest = max(-low, high)
        alpha = largest if 1e-6 < largest < 1e6 else 1.0
        if quantizer.estimator.learns_offset:
            quantizer.grid = Grid("shifted", max(0.0, -low))
            alpha = high - low if 1e-6 < high - low < 1e6 else 1.0
        elif quantizer.grid_choice == "auto":
            quantizer.grid = SIGNED if low < 0 else UNSIGNED
        quantizer.set_alpha_(quantizer.alpha_raw.new_full((1,), alpha))
    return inputs


def _widen(ends: dict[InputQuantizer, tuple[float, float]], quantizer: InputQuantizer, args: tuple[Tensor]) -> None:
    found = args[0].detach().float()
    low, high = ends.setdefault(quantizer, (0.0, 0.0))  # also of a layer that is given no rows
    if found.numel():
        ends[quantizer] = min(low, float(found.min().nan_to_num())), max(high, float(found.max().nan_to_num()))


def _random(x: Tensor) -> Tensor:
    """Random numbers in place of a floating tensor that holds one value throughout, as zeros show nothing."""
    constant = x.is_floating_point() and x.numel() > 1 and bool((x == x.flatten()[0]).all())
    return torch.rand_like(x) if constant else x
