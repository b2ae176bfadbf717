"""Attach quantizers to the layers of a model in place (``prepare_``), and take them off again (``restore_``)."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor, nn

from nipq.config import BitRange, Config, GridChoice, Phase, WeightLevels
from nipq.errors import ConfigError, NotQuantizableError, OrderError
from nipq.functional.grid import BALANCED, FULL, SIGNED, UNSIGNED, Grid
from nipq.nn.attention import PRODUCTS, AttentionProducts, Product, install, uninstall
from nipq.nn.estimators import Estimator, estimator_of
from nipq.nn.init import SHIFTS, start_weight_range_
from nipq.nn.kinds import close_shortcuts_, output_channel_axis
from nipq.nn.layers import (
    LayerQuantization,
    LayerSpec,
    attach,
    check_module,
    detach,
    is_prepared,
    quantization,
    weight_quantizer,
)
from nipq.nn.quantizer import InputQuantizer, OffsetInputQuantizer, WeightQuantizer
from nipq.nn.relu import neighbours, watch_hooks
from nipq.prepare.findings import checked_trace
from nipq.prepare.input_form import ExampleInputs, form_of, remember_form_
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.plan import LayerPlan, plan_layers, shared_groups
from nipq.prepare.rehearsal import rehearse
from nipq.prepare.trace import PRODUCT_OPERANDS, Trace

#: Grids before calibration, which replaces all but the ones that a rule asks for.
_FIRST_GRIDS: dict[GridChoice, Grid] = {
    "auto": UNSIGNED,
    "signed": SIGNED,
    "unsigned": UNSIGNED,
    "shifted": Grid("shifted", SHIFTS["hardswish"]),
}

_WEIGHT_GRIDS: dict[WeightLevels, Grid] = {"symmetric": SIGNED, "balanced": BALANCED, "full": FULL}

#: From so many fixed bits on, the clipping range of the model's own input stays as calibration set it.
FIXED_RANGE_BITS = 8


def prepare_(model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None) -> nn.Module:
    """Attach fake quantizers with learned bit-widths and clipping ranges to a model's layers, for QAT.

    Every convolution and linear layer gets one for its weight and one for its input, every embedding one for its table.
    The model is changed in place and keeps its classes and its forward; float checkpoints still load strictly. Every
    parameter exists when this returns, so build the optimizer afterwards, from ``nipq.param_groups``. If anything is
    refused, the model is left as it was.

    Args:
        model: a float model, not wrapped for several devices and not compiled.
        example_inputs: a tensor, a tuple or a dict that the model can be called with; a batch of one is enough. Their
            form is remembered: by it all functions find the inputs in a loader's batches, see
            :mod:`nipq.prepare.input_form`.
        config: settings; the default learns 2 to 8 bits everywhere and keeps the model's input at 8 bits.

    Returns:
        The same model, in phase ``"noise"``; clipping ranges of inputs still need ``calibrate_``.

    Raises:
        OrderError: if the model is prepared already.
        NotQuantizableError: if a layer cannot be quantized (every reason is listed with the module's name), there is
            none to quantize, or a deployed copy of the model was seen to compute something else than the model.
        ConfigError: if a rule matches no layer, or rules ask for two things of one weight.

    Example:
        >>> import torch
        >>> model = prepare_(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), Config(weight_bits=4))
        >>> model[0].parametrizations.weight[0].bits
        tensor([4.])
    """
    check_module(model, "prepare_")
    config = config or Config()
    if any(is_prepared(module) for module in model.modules()):
        raise OrderError(
            f"{type(model).__name__}: expected a float model, found one that is prepared already. "
            "Call nipq.restore_(model) first, or go on with this one."
        )
    return attach_quantizers_(model, example_inputs, config, checked_trace(model, example_inputs, config))


def attach_quantizers_(model: nn.Module, example_inputs: ExampleInputs, config: Config, traced: Trace) -> nn.Module:
    """:func:`prepare_` once the model has been traced and nothing found that it refuses.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: settings and rules.
        traced: one forward of it, see ``nipq.prepare.findings.checked_trace``.

    Returns:
        The same model.

    Raises:
        NotQuantizableError: if there is nothing to quantize, or a deployed copy does not compute what is trained.
        ConfigError: if rules ask for two things of one weight.
    """
    plans = plan_layers(traced.ordered(products=config.attention_bits is not None), config)
    if all(spec.is_table or spec.is_product for spec, _ in plans):
        raise NotQuantizableError(
            f"{type(model).__name__}: expected a convolution or linear layer to quantize, found none that runs and "
            "that no rule excludes. Look at nipq.validate(model, example_inputs)."
        )
    weights = _weight_quantizers(model, plans, config)
    products: dict[str, Product] = {}
    for order, (spec, plan) in enumerate(plans):
        if spec.is_product:
            products[spec.name] = Product(_product_record(spec, plan, config, order))
            continue
        layer = model.get_submodule(spec.name)
        record = LayerQuantization(spec, _input_quantizer(layer, spec, plan, config), order)
        relu = model.get_submodule(spec.relu) if spec.relu else None
        record.owns_weight = weights[spec.name].name == f"{spec.name}.weight"
        attach(layer, weights[spec.name], record, relu)
        if relu is not None and (between := neighbours(model, spec.relu or "", spec.name)):
            ended, begun = (map(model.get_submodule, names) for names in (between.ending, between.beginning))
            watch_hooks(relu, ended, layer, begun)
    _share_bits(model, shared_groups(plans, traced.shared, config))
    device = next(model.parameters()).device
    for attention in traced.attention:
        if attention.scores.name in products:
            pair = products[attention.scores.name], products[attention.mix.name]
            install(model.get_submodule(attention.name), AttentionProducts(*pair, name=attention.name).to(device))
    close_shortcuts_(model)
    remember_form_(model, form_of(example_inputs, model))
    set_phase_(model, Phase.NOISE)
    try:
        rehearse(model, example_inputs)
    except Exception:
        restore_(model)
        raise
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
    check_module(model, "restore_")
    prepared = [module for module in model.modules() if is_prepared(module)]  # copies among them, too
    if not prepared:
        layer_table(model)  # says so
    for layer in prepared:
        if not quantization(layer).spec.is_product:
            detach(layer)
    for module in list(model.modules()):
        if isinstance(getattr(module, PRODUCTS, None), AttentionProducts):
            uninstall(module)
        remember_form_(module, None)
    return model


def _share_bits(model: nn.Module, groups: list[tuple[str, ...]]) -> None:
    for group in groups:
        layers = [model.get_submodule(name) for name in group]
        weights = list(dict.fromkeys(map(weight_quantizer, layers)))  # one alone if all have the same weight
        weights[0].share_bits_with_(weights[1:])
        inputs = [own for layer in layers if (own := quantization(layer).input) is not None]
        if inputs:
            inputs[0].share_bits_with_(inputs[1:])


def _estimator(config: Config) -> Estimator:
    return estimator_of(config.method, **{field.name: getattr(config, field.name) for field in fields(Estimator)})


def _weight_quantizers(
    model: nn.Module, plans: list[tuple[LayerSpec, LayerPlan]], config: Config
) -> dict[str, WeightQuantizer]:
    """The weight quantizer of each layer, by name; layers with one weight between them get one quantizer."""
    found: dict[str, WeightQuantizer] = {}
    owners: dict[int, tuple[LayerSpec, LayerPlan]] = {}
    for spec, plan in plans:
        if spec.is_product:
            continue
        layer = model.get_submodule(spec.name)
        first, first_plan = owners.setdefault(id(layer.weight), (spec, plan))
        ours, theirs = ((x.weight_bits, x.granularity, x.weight_levels) for x in (plan, first_plan))
        if ours != theirs:
            raise ConfigError(
                f"{spec.name}: expected the settings of {first.name}, with which it shares its weight, found others. "
                "Let the rules give both the same weight_bits, granularity and weight_levels."
            )
        found[spec.name] = found[first.name] if first is not spec else _weight_quantizer(layer, spec, plan, config)
    return found


def _weight_quantizer(layer: nn.Module, spec: LayerSpec, plan: LayerPlan, config: Config) -> WeightQuantizer:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    axis = output_channel_axis(layer) if plan.granularity == "channel" else None
    quantizer = WeightQuantizer(
        f"{spec.name}.weight",
        plan.weight_bits,
        channels=1 if axis is None else weight.shape[axis],
        channel_axis=axis or 0,
        grid=_WEIGHT_GRIDS[plan.weight_levels],
        estimator=_estimator(config),
        init=config.init,
    ).to(weight.device)
    start_weight_range_(quantizer, weight)
    return quantizer


def _input_quantizer(layer: nn.Module, spec: LayerSpec, plan: LayerPlan, config: Config) -> InputQuantizer | None:
    if plan.activation_bits is None:
        return None
    assert isinstance(layer.weight, Tensor)
    bits, learns = plan.activation_bits, True
    if spec.is_input:
        few = bits.fixed is None or bits.fixed < FIXED_RANGE_BITS
        learns = few if config.learn_input_range is None else config.learn_input_range
    return _operand(f"{spec.name}.input", bits, plan.grid, config, learns=learns).to(layer.weight.device)


def _product_record(spec: LayerSpec, plan: LayerPlan, config: Config, order: int) -> LayerQuantization:
    """The quantizers of both operands of a product, under the names that attention gives them."""
    assert plan.activation_bits is not None
    first, second = PRODUCT_OPERANDS[spec.kind]
    quantizers = [
        _operand(f"{spec.name}.{name}", plan.activation_bits, grid, config)
        for name, grid in ((first, plan.grid), (second, "auto"))
    ]
    return LayerQuantization(spec, quantizers[0], order, quantizers[1])


def _operand(name: str, bits: BitRange, grid: GridChoice, config: Config, *, learns: bool = True) -> InputQuantizer:
    estimator = _estimator(config)
    kind = OffsetInputQuantizer if estimator.learns_offset else InputQuantizer
    return kind(
        name, bits, grid=_FIRST_GRIDS[grid], grid_choice=grid, estimator=estimator, init=config.init,
        learns_range=learns,
    )  # fmt: skip
