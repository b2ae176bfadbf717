"""Check a float model before it is prepared: refusals, parts that stay float, and notes, each by the module's name."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nipq.config import Config
from nipq.errors import Diagnostic, NotQuantizableError
from nipq.nn.attention import FUNCTION
from nipq.nn.kinds import is_plain, is_supported, is_table, output_channel_axis
from nipq.nn.layers import is_prepared
from nipq.prepare.batches import ExampleInputs
from nipq.prepare.plan import LayerPlan, plan_layers, shared_groups, target_notes
from nipq.prepare.trace import Trace, trace

#: Remedy where attention has a form that cannot be quantized.
_REMEDY = (
    'Choose an implementation that calls it (transformers: attn_implementation="sdpa"; timm: '
    "timm.layers.set_fused_attn before the model is built), or leave attention_bits out."
)
#: Products of two activations.
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
#: Wrappers that change how parameters are found; by name, so that none has to be imported.
_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
    "ScriptModule",
}


def validate(model: nn.Module, example_inputs: ExampleInputs, config: Config | None = None) -> list[Diagnostic]:
    """List everything that ``prepare_`` would refuse, leave float, or do in a way worth knowing; changes nothing.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: as for :func:`prepare_`.

    Returns:
        Findings, refusals first. A model that must not even be run (see ``prepare_``) has refusals only.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs.
        ConfigError: if a rule matches no layer.
    """
    refusals = list(_before_running(model))
    if refusals:
        return refusals
    order = {"error": 0, "float": 1, "note": 2}
    findings = _findings(model, trace(model, example_inputs), config or Config())
    return sorted(findings, key=lambda finding: order[finding.severity])


def checked_trace(model: nn.Module, example_inputs: ExampleInputs, config: Config) -> Trace:
    """Trace a model that can be prepared.

    Args:
        model: a float model.
        example_inputs: as for :func:`prepare_`.
        config: settings and rules.

    Returns:
        One forward of it.

    Raises:
        NotQuantizableError: with every refusal, each by its module's name.
        ConfigError: if a rule matches no layer.
    """
    refusals = list(_before_running(model))
    if not refusals:
        traced = trace(model, example_inputs)
        refusals = [finding for finding in _findings(model, traced, config) if finding.severity == "error"]
        if not refusals:
            return traced
    raise NotQuantizableError("expected a model that can be prepared, found\n" + "\n".join(map(str, refusals)))


def _before_running(model: nn.Module) -> Iterator[Diagnostic]:
    """Refusals of models that a watched forward would change, or that cannot run one."""
    for name, module in model.named_modules():
        wrapper = _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}
        if wrapper:
            remedy = "Prepare the bare model first, then wrap, distribute or compile it."
            yield Diagnostic(name, "error", f"it is wrapped in {wrapper.pop()}", remedy)
        if is_prepared(module):
            yield Diagnostic(name, "error", "it is prepared already", "Call nipq.restore_(model) first.")
        for key, parameter in module.named_parameters(recurse=False):
            where = f"{name}.{key}".lstrip(".")
            if is_lazy(parameter):
                yield Diagnostic(where, "error", "it has no shape yet", "Run one float forward before preparing.")
            elif parameter.is_meta:
                yield Diagnostic(where, "error", "it has no values yet", "Load the weights before preparing.")


def _findings(model: nn.Module, traced: Trace, config: Config) -> Iterator[Diagnostic]:
    specs = traced.ordered(products=config.attention_bits is not None)
    plans = {spec.name: (spec, plan) for spec, plan in plan_layers(specs, config)}
    for name, module in model.named_modules():
        if name in plans:
            yield from _layer_findings(name, module, plans[name][1])
        elif not is_supported(module):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    where = f"{name}.{key}".lstrip(".")
                    yield Diagnostic(where, "float", f"{type(module).__name__} has no quantized form here")
    for name in traced.unused:
        yield Diagnostic(name, "float", "the example forward does not call it")
    for spec in specs:
        if spec.name not in plans:
            asked = spec.is_table and config.embedding_bits is None
            reason = "the settings leave embeddings float" if asked else "a rule excludes it"
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


def _layer_findings(name: str, layer: nn.Module, plan: LayerPlan) -> Iterator[Diagnostic]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
        yield Diagnostic(
            name,
            "error",
            "its weight is not a plain parameter (weight norm, spectral norm, pruning or another parametrization)",
            "Remove that first, for example with torch.nn.utils.parametrize.remove_parametrizations.",
        )
    elif not weight.is_floating_point():
        yield Diagnostic(name, "error", f"its weight is of type {weight.dtype}", "Convert the layer to float32.")
    elif not bool(torch.isfinite(weight).all()):
        yield Diagnostic(name, "error", "its weight holds NaN or infinity", "Load a sound checkpoint.")
    if plan.granularity == "channel" and output_channel_axis(layer) is None:
        yield Diagnostic(
            name,
            "error",
            "clipping ranges per channel of a grouped transposed convolution do not lie along one axis",
            f"Use Rule({name!r}, granularity='tensor').",
        )
    if is_table(layer):
        yield from _table_findings(name, layer)
    if not is_plain(layer):
        own = f"{type(layer).__name__} has a forward of its own; it sees the quantized weight and first input"
        yield Diagnostic(name, "note", own)


def _table_findings(name: str, table: nn.Module) -> Iterator[Diagnostic]:
    remedy = f"Use Rule({name!r}, quantize=False), or build the embedding without it."
    if getattr(table, "max_norm", None) is not None:
        yield Diagnostic(name, "error", "its max_norm writes into the table in the forward, past the quantizer", remedy)
    if getattr(table, "sparse", False):
        yield Diagnostic(name, "error", "its sparse gradients cannot pass the quantizer, which reads the table", remedy)


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
            yield Diagnostic(
                quantized[0], "note", f"it shares its weight with {', '.join(others)}, which reads it as float"
            )


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
