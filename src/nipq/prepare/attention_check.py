"""Attention that is to be quantized and cannot be, by the module's name, with what to choose instead."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import nn

from nipq.finding import Finding
from nipq.nn.attention import FUNCTION
from nipq.nn.kinds import is_supported
from nipq.prepare.trace import Trace

_REMEDY = (
    'Choose an implementation that calls it (transformers: attn_implementation="sdpa"; timm: '
    "timm.layers.set_fused_attn before the model is built), or leave attention_bits out."
)
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


def attention_findings(model: nn.Module, traced: Trace, planned: Set[str]) -> Iterator[Finding]:
    """Refusals where ``attention_bits`` asks for what no product of this library stands for.

    Attention is known by what it does: a call of torch's function, of its fused form with projections, or a softmax
    between two products of activations.

    Args:
        model: the float model.
        traced: one forward of it.
        planned: names of the modules whose attention is to be quantized.
    """
    pieces: dict[str, dict[str, int]] = {}
    for piece in traced.float_pieces:
        pieces.setdefault(piece.name, {})[piece.operation] = piece.count
    found = bool(traced.attention)
    softmaxes = [name for name, counts in pieces.items() if "softmax" in counts]
    for name, counts in pieces.items():
        fused = "multi_head_attention_forward" in counts
        between = any(other == name or other.startswith(f"{name}.") for other in softmaxes)  # it may be a module
        if fused or (between and sum(counts.get(product, 0) for product in _PRODUCTS) > 1):
            found, how = (
                True,
                "torch's fused projections and attention" if fused else "products and a softmax of its own",
            )
            yield Finding(name, "error", f"it computes attention by {how}, not by {FUNCTION}", _REMEDY)
    for attention in traced.attention:
        if "forward" in vars(model.get_submodule(attention.name)):
            remedy = "Take off what wraps it before preparing."
            yield Finding(attention.name, "error", "the forward of this very module was replaced", remedy)
        if attention.name in planned and is_supported(model.get_submodule(attention.name)):
            remedy = f"Call {FUNCTION} from a module around it, or leave attention_bits out."
            yield Finding(attention.name, "error", "a layer with a weight computes attention by itself", remedy)
        for outer in sorted(attention.within & planned if attention.name not in planned else ()):
            where = outer or f"the model ({type(model).__name__})"
            remedy = (
                "Let the rules quantize both or neither: the products of the outer one would stand in its place too."
            )
            yield Finding(attention.name, "error", f"it stays float and runs inside the attention of {where}", remedy)
    if not found:
        yield Finding("", "error", f"attention_bits is set, and no module calls {FUNCTION}", _REMEDY)
