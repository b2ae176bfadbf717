"""Refusals of a float model, parts that stay float, and notes, each by the module's name, from one traced forward."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nipq.config import Config
from nipq.distributed import SHARDING_WRAPPERS, WRAPPERS
from nipq.errors import Diagnostic, NotQuantizableError
from nipq.functional.grid import BALANCED_BITS
from nipq.nn.attention import FUNCTION, PRODUCTS
from nipq.nn.kinds import is_supported, is_table, output_channel_axis
from nipq.nn.layers import LayerSpec, check_module, is_prepared
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.plan import LayerPlan, is_adapter, plan_layers, shared_groups, target_notes
from nipq.prepare.probe import probe
from nipq.prepare.trace import REASONS, Trace, UnquantizedOp, trace

#: Remedy where attention has a form that cannot be quantized.
_REMEDY = (
    'Choose an implementation that calls it (transformers: attn_implementation="sdpa"; timm: '
    "timm.layers.set_fused_attn before the model is built), or leave attention_bits out."
)
#: Products of two activations.
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
#: Wrappers that change how parameters are found, and how to get the model out of them, where there is a way.
_WRAPPERS = {kind: f".{part}" for kind, part in WRAPPERS.items()} | {
    **dict.fromkeys(SHARDING_WRAPPERS, ".module"),
    "FSDPModule": "",
    "ScriptModule": "",
}
#: Attributes that preparing and deploying add to a layer.
_OURS = ("quantization", "parametrizations", "deployed_in")


def checked_trace(model: nn.Module, example_inputs: ExampleInputs, config: Config) -> Trace:
    """Trace a model that can be prepared.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: settings and rules.

    Returns:
        One forward of it; layers with a forward of their own have been tested.

    Raises:
        NotQuantizableError: with every refusal, each by its module's name.
        ConfigError: if a rule matches no layer.
    """
    refusals = list(before_running(model))
    if not refusals:
        traced, findings = examined(model, trace(model, example_inputs), config)
        refusals = [finding for finding in findings if finding.severity == "error"]
        if not refusals:
            return traced
    message = "expected a model that can be prepared, found\n" + "\n".join(map(str, refusals))
    raise NotQuantizableError(message, refusals)


def before_running(model: nn.Module) -> Iterator[Diagnostic]:
    """Refusals of models that a watched forward would change, or that cannot run one.

    Args:
        model: a model.
    """
    check_module(model)
    devices = sorted({str(parameter.device) for parameter in model.parameters()} - {"meta"})
    if len(devices) > 1:
        remedy = "Put the whole model on one of them before preparing."
        yield Diagnostic("", "error", f"its parameters are on several devices ({', '.join(devices)})", remedy)
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for wrapper in [wrapper for wrapper in _WRAPPERS if wrapper in kinds][:1]:
            inner = f" ({name or 'model'}{_WRAPPERS[wrapper]})" if _WRAPPERS[wrapper] else ""
            remedy = f"Prepare the bare model first{inner}, then wrap, distribute or compile it."
            yield Diagnostic(name, "error", f"it is wrapped in {wrapper}", remedy)
        if vars(module).get("_compiled_call_impl") is not None:
            remedy = "Set its attribute _compiled_call_impl to None, prepare the model, then compile it again."
            yield Diagnostic(name, "error", "it was compiled in place (module.compile())", remedy)
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            remedy = "Delete the attribute (del module.forward), prepare the model, then compile it again."
            yield Diagnostic(name, "error", "its attribute forward holds a compiled function", remedy)
        if is_prepared(module):
            yield Diagnostic(name, "error", "it is prepared already", "Call nipq.restore_(model) first.")
        for key, parameter in module.named_parameters(recurse=False):
            where = f"{name}.{key}".lstrip(".")
            if is_lazy(parameter):
                yield Diagnostic(where, "error", "it has no shape yet", "Run one float forward before preparing.")
            elif hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
                yield Diagnostic(where, "error", "it is distributed over processes", "Prepare before distributing.")
            elif parameter.is_meta:
                yield Diagnostic(where, "error", "it has no values yet", "Load the weights before preparing.")


def examined(model: nn.Module, traced: Trace, config: Config) -> tuple[Trace, list[Diagnostic]]:
    """Test the layers with a forward of their own, and collect everything found.

    Args:
        model: a float model.
        traced: one forward of it.
        config: settings and rules.

    Returns:
        The trace, with the form of each layer, and the findings.

    Raises:
        ConfigError: if a rule matches no layer.
    """
    plans = plan_layers(traced.ordered(products=config.attention_bits is not None), config)
    specs, findings = list(traced.layers), list[Diagnostic]()
    ops = list(traced.unquantized_ops)
    for place, spec in enumerate(specs):
        if spec.name in traced.own_calls and any(spec is planned for planned, _ in plans):
            specs[place], found = _tested(model, spec, traced)
            findings += found
            if spec.batchnorm and specs[place].batchnorm is None:
                ops.append(UnquantizedOp(spec.batchnorm, "batch_norm", REASONS["batch_norm"]))
    traced = replace(traced, layers=tuple(specs), unquantized_ops=tuple(ops))
    return traced, [*findings, *_findings(model, traced, config)]


def _tested(model: nn.Module, spec: LayerSpec, traced: Trace) -> tuple[LayerSpec, list[Diagnostic]]:
    """Facts of a layer with a forward of its own, with its form; or the reason to refuse it."""
    layer, call = model.get_submodule(spec.name), traced.own_calls[spec.name]
    if any(_parameter_findings(spec.name, layer)):
        return spec, []  # refused for these
    tried = probe(layer, call)
    kind = type(layer).__name__
    if tried.form is None:
        reason = f"{kind} has a forward of its own that cannot be quantized: {tried.problem}"
        return spec, [Diagnostic(spec.name, "error", reason, f"Leave it float with {_rule(spec.name)}.")]
    macs = round(spec.macs * tried.uses)
    if tried.form == "linear":
        own = f"{kind} has a forward of its own, found to compute its operation and a bias, nothing else"
        return replace(spec, form="linear", macs=macs), [Diagnostic(spec.name, "note", own)]
    own = (
        f"{kind} has a forward of its own that does more than its operation; it is kept, and computes in floats on the "
        "quantized weight" + ("" if spec.is_table else " and first input")
    )
    return replace(spec, form="kept", batchnorm=None, macs=macs), [Diagnostic(spec.name, "note", own)]


def _rule(name: str) -> str:
    return f"Rule({name!r}, quantize=False)"


def _findings(model: nn.Module, traced: Trace, config: Config) -> Iterator[Diagnostic]:
    specs = traced.ordered(products=config.attention_bits is not None)
    plans = {spec.name: (spec, plan) for spec, plan in plan_layers(specs, config)}
    for name, module in model.named_modules():
        if name in plans:
            yield from _layer_findings(name, module, plans[name][1], traced)
        elif not is_supported(module):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    where = f"{name}.{key}".lstrip(".")
                    yield Diagnostic(where, "float", f"{type(module).__name__} has no quantized form here")
    for name in traced.unused:
        readers = ", ".join(reader or "the model" for reader in traced.weight_readers.get(name, ()))
        how = "calls its forward directly, past its hooks" if name in traced.by_hand else "does not call it"
        how += f"; {readers} reads its weight or bias" if readers and name not in traced.by_hand else ""
        yield Diagnostic(name, "float", f"the example forward {how}")
    for name in traced.unused_norms:
        yield Diagnostic(name, "note", "the example forward does not call this batch norm; its statistics stay")
    for spec in specs:
        if spec.name not in plans:
            asked = spec.is_table and config.embedding_bits is None
            reason = "the settings leave embeddings float" if asked else "a rule excludes it"
            if is_adapter(spec.name):
                reason = "an adapter of PEFT's stays float unless a rule names it"
            yield Diagnostic(spec.name, "float", reason)
        elif plans[spec.name][1].activation_bits is None and not spec.is_table:
            yield Diagnostic(f"{spec.name}.input", "float", "the settings leave this input float")
    replaced = {attention.name for attention in traced.attention if attention.scores.name in plans}
    for op in traced.unquantized_ops:
        if op.operation == FUNCTION and op.name in replaced:
            yield Diagnostic(op.name, "float", "softmax: it stays float between the two products of attention")
            continue
        times = f" ({op.count} times)" if op.count > 1 else ""
        yield Diagnostic(op.name, "float", f"{op.operation}{times}: {op.reason}")
    if config.attention_bits is not None:
        yield from _attention_findings(model, traced, replaced)
    for spec, _ in plans.values():
        if spec.calls > 1 and not spec.is_product:
            once = f"one forward calls it {spec.calls} times; one weight and one input quantizer serve every call"
            yield Diagnostic(spec.name, "note", once)
    for first, *others in shared_groups(plans.values(), traced.shared, config):
        yield Diagnostic(first, "note", f"it shares its bit-widths with {', '.join(others)}")
    yield from _tied(model, set(plans))
    if config.target is not None:
        for name, reason in target_notes(model, plans, traced.shared, config.target):
            yield Diagnostic(name, "note", reason)


def _layer_findings(name: str, layer: nn.Module, plan: LayerPlan, traced: Trace) -> Iterator[Diagnostic]:
    yield from _parameter_findings(name, layer)
    if plan.granularity == "channel" and output_channel_axis(layer) is None:
        yield Diagnostic(
            name,
            "error",
            "clipping ranges per channel of a grouped transposed convolution do not lie along one axis",
            f"Use Rule({name!r}, granularity='tensor').",
        )
    if is_table(layer):
        yield from _table_findings(name, layer, plan)
    for own in _OURS:
        if hasattr(layer, own) and not parametrize.is_parametrized(layer):
            remedy = f"Rename it, or leave the layer float with {_rule(name)}."
            yield Diagnostic(name, "error", f"it has an attribute {own!r}, a name that preparing needs", remedy)
    if name in traced.by_hand:
        yield Diagnostic(
            name,
            "error",
            "its forward is called directly as well, past the hooks that quantize its input",
            f"Call the layer, not layer.forward, or leave it float with {_rule(name)}.",
        )
    if name in traced.written:
        yield Diagnostic(
            name,
            "error",
            "the forward writes into its weight or bias, and a quantized weight is computed anew for each call",
            f"Change the weight after the optimizer's step instead, or leave the layer float with {_rule(name)}.",
        )
    readers = ", ".join(reader or "the model" for reader in traced.weight_readers.get(name, ()))
    if name in traced.past:
        yield Diagnostic(
            name,
            "error",
            f"its weight or bias is read past the layer by {readers} (from a list, a closure or parameters())",
            f"Read it as layer.weight where it is needed, or leave the layer float with {_rule(name)}.",
        )
    elif readers:
        also = f"its weight or bias is read by {readers}, too, which sees the quantized weight; no batch norm is folded"
        yield Diagnostic(name, "note", also)


def _parameter_findings(name: str, layer: nn.Module) -> Iterator[Diagnostic]:
    """Refusals of a layer whose weight or bias is no plain parameter of finite floats."""
    otherwise = f"or leave the layer float with {_rule(name)}."
    for key in ("weight", "bias"):
        if getattr(layer, key, None) is not None and (computed := _computed(layer, name, key)):
            reason, remedy = computed
            yield Diagnostic(name, "error", f"its {key} is not a plain parameter ({reason})", f"{remedy}, {otherwise}")
            if key == "weight":
                return
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        kind = f"{weight.dtype} ({type(weight if type(weight.data) is Tensor else weight.data).__name__})"
        remedy = f"Load or convert it as plain floats (without a quantization_config, say), {otherwise}"
        yield Diagnostic(name, "error", f"its weight is of type {kind}", remedy)
    elif not bool(torch.isfinite(weight).all()):
        yield Diagnostic(name, "error", "its weight holds NaN or infinity", "Load a sound checkpoint.")


def _computed(layer: nn.Module, name: str, key: str) -> tuple[str, str] | None:
    """By what a parameter of a layer is computed from others, and how to end that; None if it is not."""
    arguments = f"(model.get_submodule({name!r}), {key!r})"
    if parametrize.is_parametrized(layer, key):
        steps = [type(step).__name__ for step in layer.parametrizations[key]]  # type: ignore[index]
        known = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm"}
        remedy = f"Call torch.nn.utils.parametrize.remove_parametrizations{arguments}"
        return ", ".join(known.get(step, f"parametrized by {step}") for step in steps), remedy
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == key:
            return "weight norm", f"Call torch.nn.utils.remove_weight_norm{arguments}"
        if isinstance(hook, SpectralNorm) and hook.name == key:
            return "spectral norm", f"Call torch.nn.utils.remove_spectral_norm{arguments}"
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == key:
            return "pruning", f"Call torch.nn.utils.prune.remove{arguments}, which makes ordinary weights of the zeros"
    return None if key in layer._parameters else ("it is computed from something else", "Make it a parameter")


def _table_findings(name: str, table: nn.Module, plan: LayerPlan) -> Iterator[Diagnostic]:
    remedy = f"Use Rule({name!r}, quantize=False), or build the embedding without it."
    if getattr(table, "max_norm", None) is not None:
        yield Diagnostic(name, "error", "its max_norm writes into the table in the forward, past the quantizer", remedy)
    if getattr(table, "sparse", False):
        yield Diagnostic(name, "error", "its sparse gradients cannot pass the quantizer, which reads the table", remedy)
    few = plan.weight_bits.choices[0] <= BALANCED_BITS
    if getattr(table, "padding_idx", None) is not None and plan.weight_levels == "balanced" and few:
        reason = "it has a row for padding, which is zero, and a balanced grid has no level there"
        remedy = f"Use Rule({name!r}, weight_levels='symmetric'), and the same for a layer that shares its weight."
        yield Diagnostic(name, "error", reason, remedy)


def _tied(model: nn.Module, planned: set[str]) -> Iterator[Diagnostic]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim > 1:
                owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        quantized = [name for name in names if name in planned]
        others = [name for name in names if name not in planned]
        if len(quantized) > 1:
            shared = f"it shares its weight, and so its weight quantizer, with {', '.join(quantized[1:])}"
            yield Diagnostic(quantized[0], "note", shared)
        if quantized and others:
            readers = ", ".join(name or "the model" for name in others)
            yield Diagnostic(quantized[0], "note", f"it shares its weight with {readers}, which reads it as float")


def _attention_findings(model: nn.Module, traced: Trace, planned: Set[str]) -> Iterator[Diagnostic]:
    """Refusals of attention that ``attention_bits`` asks for and that has a form which cannot be quantized.

    Attention is known by what it does: a call of torch's function, of its fused form with projections, or a softmax
    between two products of activations.

    Args:
        model: the float model.
        traced: one forward of it.
        planned: names of the modules whose attention is to be quantized.
    """
    ops: dict[str, dict[str, int]] = {}
    for op in traced.unquantized_ops:
        ops.setdefault(op.name, {})[op.operation] = op.count
    found = bool(traced.attention)
    softmaxes = [name for name, counts in ops.items() if "softmax" in counts]
    for name, counts in ops.items():
        fused = "multi_head_attention_forward" in counts
        between = any(other == name or other.startswith(f"{name}.") for other in softmaxes)  # it may be a module
        if fused or (between and sum(counts.get(product, 0) for product in _PRODUCTS) > 1):
            found = True
            how = "torch's fused projections and attention" if fused else "products and a softmax of its own"
            yield Diagnostic(name, "error", f"it computes attention by {how}, not by {FUNCTION}", _REMEDY)
    for attention in traced.attention:
        if hasattr(model.get_submodule(attention.name), PRODUCTS):
            remedy = "Rename it, or leave attention_bits out."
            yield Diagnostic(attention.name, "error", f"it has an attribute {PRODUCTS!r}, a name of ours", remedy)
        if "forward" in vars(model.get_submodule(attention.name)):
            remedy = "Remove its wrapper before preparing."
            yield Diagnostic(attention.name, "error", "the forward of this very module was replaced", remedy)
        if attention.name in planned and is_supported(model.get_submodule(attention.name)):
            remedy = f"Call {FUNCTION} from a module around it, or leave attention_bits out."
            yield Diagnostic(attention.name, "error", "a layer with a weight computes attention by itself", remedy)
        for outer in sorted(attention.within & planned if attention.name not in planned else ()):
            where = outer or f"the model ({type(model).__name__})"
            remedy = (
                "Let the rules quantize both or neither: the products of the outer one would stand in its place too."
            )
            yield Diagnostic(
                attention.name, "error", f"it stays float and runs inside the attention of {where}", remedy
            )
    if not found:
        yield Diagnostic("", "error", f"attention_bits is set, and no module calls {FUNCTION}", _REMEDY)
