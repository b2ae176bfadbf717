"""Attach quantizers to a model that somebody else wrote, and take them off again."""

from __future__ import annotations

from torch import Tensor, nn

from nipq.config import Config
from nipq.control import set_phase_
from nipq.errors import NotQuantizableError, OrderError
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.layer_table import layer_table
from nipq.nn.initial import SHIFTS, start_weight_boundary_
from nipq.nn.layers import LayerQuantization, LayerSpec, attach, detach, is_prepared
from nipq.nn.quantizer import InputQuantizer, WeightQuantizer
from nipq.phases import Phase
from nipq.plan import LayerPlan, plan_layers
from nipq.trace import ExampleInputs
from nipq.validate import checked_trace


def prepare_(model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None) -> nn.Module:
    """Give every convolution and linear layer a learned bit-width and boundary for its weight and for its input.

    The model is changed in place and keeps its classes and its forward; float checkpoints still load strictly. Every
    parameter exists when this returns, so build the optimizer afterwards, from ``nipq.param_groups``.

    Args:
        model: a float model, not wrapped for several devices and not compiled.
        example_inputs: a tensor, a tuple or a dict that the model can be called with; a batch of one is enough.
        config: settings; the default learns 2 to 8 bits everywhere and keeps the model's input at 8 bits.

    Returns:
        The same model, in phase ``"noise"``; boundaries of inputs still need ``calibrate_``.

    Raises:
        OrderError: if the model is prepared already.
        NotQuantizableError: if a layer cannot be quantized; every reason is listed with the module's name.
        ConfigError: if a rule matches no layer.
    """
    config = config or Config()
    if any(is_prepared(module) for module in model.modules()):
        raise OrderError(
            f"{type(model).__name__}: expected a float model, found one that is prepared already. "
            "Call nipq.restore_(model) first, or go on with this one."
        )
    traced = checked_trace(model, example_inputs, config)
    shared: dict[int, WeightQuantizer] = {}
    for spec, plan in plan_layers(traced.layers, config):
        layer = model.get_submodule(spec.name)
        key = id(layer.weight)
        if key not in shared:
            shared[key] = _weight_quantizer(layer, spec, plan, config)
        attach(layer, shared[key], LayerQuantization(spec, _input_quantizer(layer, spec, plan, config)))
    set_phase_(model, Phase.NOISE)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Take every quantizer off again: the float model with its (trained) float weights and its first parameter names.

    Args:
        model: a prepared model.

    Returns:
        The same model.

    Raises:
        OrderError: if the model is not prepared.
    """
    for row in layer_table(model):
        detach(row.layer)
    return model


def _weight_quantizer(layer: nn.Module, spec: LayerSpec, plan: LayerPlan, config: Config) -> WeightQuantizer:
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, assignment, operator]
    axis, channels = 0, 1
    if plan.granularity == "channel":
        transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        if transposed and layer.groups > 1:
            raise NotQuantizableError(
                f"{spec.name}: per-channel boundaries of a grouped transposed convolution do not lie along one axis. "
                f"Use Rule({spec.name!r}, granularity='tensor')."
            )
        axis = 1 if transposed else 0
        channels = weight.shape[axis]
    quantizer = WeightQuantizer(
        f"{spec.name}.weight",
        plan.weight_bits,
        channels=channels,
        channel_axis=axis,
        grid=SIGNED,
        noise=config.noise,
        stochastic_bits=config.stochastic_bits,
        clip_after_noise=config.clip_after_noise,
        boundary_correction=config.boundary_correction,
    ).to(weight.device)
    start_weight_boundary_(quantizer, weight, config.init)
    return quantizer


def _input_quantizer(layer: nn.Module, spec: LayerSpec, plan: LayerPlan, config: Config) -> InputQuantizer | None:
    if plan.activation_bits is None:
        return None
    grids = {"signed": SIGNED, "unsigned": UNSIGNED, "shifted": Grid("shifted", SHIFTS["hardswish"]), "auto": UNSIGNED}
    return InputQuantizer(
        f"{spec.name}.input",
        plan.activation_bits,
        grid=grids[plan.grid],
        grid_choice=plan.grid,
        init=config.init,
        noise=config.noise,
        stochastic_bits=config.stochastic_bits,
        clip_after_noise=config.clip_after_noise,
        boundary_correction=config.boundary_correction,
    ).to(layer.weight.device)  # type: ignore[arg-type]
