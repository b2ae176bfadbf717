"""What computes outside the quantized layers, by the name of its torch function, and why it stays float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.overrides import resolve_name

_ALIASES = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul"}
_ALIASES |= {"truediv": "div", "itruediv": "div", "rtruediv": "div", "rmatmul": "matmul"}

# Why a functional piece stays float, by the last part of its torch name. ReLU-like clamps, reshapes and concatenations
# are left out: they do no arithmetic that the next quantizer would not see.
BETWEEN_ACTIVATIONS = ("add", "sub", "mul", "div")
_OPERATIONS = {
    "sums of activations stay float; the next layer quantizes what it reads": "add sub",
    "products of activations stay float; the next layer quantizes what it reads": "mul div",
    "pooling has no weights; it stays float between two quantizers": """
        mean avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool2d interpolate
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""",
    "smooth activation functions stay float; the next layer quantizes their result": """
        silu gelu hardswish sigmoid hardsigmoid tanh softmax log_softmax mish elu selu celu softplus""",
    "products of two activations have no weights to quantize; attention stays float": "matmul bmm baddbmm einsum",
    "attention stays float, its softmax and both of its products (attention_bits would quantize the products)": """
        scaled_dot_product_attention""",
    "torch's fused attention reads its projections' weights past their modules": "multi_head_attention_forward",
    "normalisation stays float (a batch norm is folded where it alone reads what one layer made)": """
        layer_norm batch_norm group_norm instance_norm rms_norm local_response_norm rsqrt""",
    "it is looked up as a function or in bags, so the table stays float": "embedding embedding_bag",
    "it is called as a function, not as a module, so there is nothing to attach quantizers to": """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear""",
}
REASONS = {name: reason for reason, names in _OPERATIONS.items() for name in names.split()}


@dataclass(frozen=True)
class FloatPiece:
    """A computation that stays float, and why.

    Attributes:
        name: full name of the innermost module in which it happens; empty for the model itself.
        operation: what is computed, such as ``"add"``.
        reason: why it stays float.
        count: how often one forward does it there.
    """

    name: str
    operation: str
    reason: str
    count: int = 1


def operation_of(func: Callable[..., Any]) -> str:
    """Plain name of a torch function: ``add`` for ``Tensor.__iadd__`` and ``Tensor.add_`` alike."""
    name = str(resolve_name(func) or getattr(func, "__name__", "?")).rsplit(".", 1)[-1].strip("_")
    return _ALIASES.get(name, name)
