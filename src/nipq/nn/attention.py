"""Attention whose two products are quantized, in the place of torch's ``scaled_dot_product_attention``.

While the forward of a module that calls that function runs, a function mode puts :class:`AttentionProducts` in its
place; so it works for every model that calls it, and no code is edited. The softmax stays float::

    p      = softmax(scale * Q(query) Q(key)^T + mask)
    result = Q(p) Q(value)

Each product is like a layer whose weight is computed: query and probability are its inputs, key and value its weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode

from nipq.config import Phase
from nipq.errors import OrderError
from nipq.nn.integer import refuse_dropout, whole_product
from nipq.nn.layers import LayerQuantization, quantization
from nipq.nn.shells import subclass

#: Name of the function that is replaced, and of the submodule that holds its quantizers.
FUNCTION, PRODUCTS = "scaled_dot_product_attention", "attention_products"


class Product(nn.Module):
    """The product of two computed tensors, both quantized.

    Args:
        record: facts and both quantizers.
    """

    def __init__(self, record: LayerQuantization) -> None:
        super().__init__()
        self.quantization = record

    def forward(self, x: Tensor, y: Tensor, drop: float = 0.0) -> Tensor:
        """The product, in whole codes in phase ``int``.

        Args:
            x: shape (..., n, k).
            y: shape (..., k, m).
            drop: share of the quantized x to drop.

        Returns:
            Shape (..., n, m).
        """
        record = quantization(self)
        first, second = record.input, record.computed
        assert first is not None
        assert second is not None
        if first.phase is not Phase.INT:
            x, y = first(x), second(y)
            return torch.matmul(dropout(x, drop) if drop else x, y)
        refuse_dropout(record.spec.name, drop)
        ranges = (*first.code_range(), *second.code_range())
        found = whole_product(first(x), second(y), first.step() * second.step(), *map(float, ranges))
        return found.to(x.dtype)


class AttentionProducts(nn.Module):
    """Quantized ``scaled_dot_product_attention`` of one module: the same arguments and result but for quantization.

    Args:
        scores: computes query times key.
        mix: computes probability times value.
        name: full name of the attention module, for messages.
    """

    def __init__(self, scores: nn.Module, mix: nn.Module, name: str) -> None:
        super().__init__()
        self.scores, self.mix, self.name = scores, mix, name or "the model"
        self.register_load_state_dict_pre_hook(_accept_float_checkpoint)  # type: ignore[no-untyped-call]  # torch gives it no type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention; a row whose every key is masked gives 0, as torch's function does.

        Args:
            query: shape (..., heads, queries, width).
            key: shape (..., heads, keys, width).
            value: shape (..., heads, keys, value width).
            attn_mask: what to add to the scores, or where to attend; None for everywhere.
            dropout_p: share of the probabilities to drop, after they are quantized.
            is_causal: attend to keys that are not after the query.
            scale: of the scores, 1 / sqrt(width) if left out.
            enable_gqa: repeat heads of key and value to those of the query.

        Returns:
            Shape (..., heads, queries, value width).
        """
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.scores(query, key.transpose(-2, -1)) * scale
        blocked = None
        if is_causal:
            blocked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        if attn_mask is not None:
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
            blocked = hidden if blocked is None else blocked | hidden
            if attn_mask.dtype != torch.bool:
                scores = scores + attn_mask.masked_fill(hidden, 0)
        if blocked is not None:
            scores = scores.masked_fill(blocked, torch.finfo(scores.dtype).min)
        probability = torch.softmax(scores, -1)
        if blocked is not None:
            probability = probability.masked_fill(blocked, 0)
        found: Tensor = self.mix(probability, value, dropout_p)
        return found


class _Replaced(TorchFunctionMode):
    def __init__(self, products: AttentionProducts, calls: list[bool]) -> None:
        super().__init__()
        self.products, self.calls = products, calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if getattr(func, "__name__", "") != FUNCTION:
            return func(*args, **(kwargs or {}))
        self.calls.append(True)
        return self.products(*args, **(kwargs or {}))


def install(module: nn.Module, products: AttentionProducts) -> None:
    """Put quantized products in the place of torch's function while the module's forward runs.

    The module's class becomes a subclass of it: an attribute ``forward`` could not be pickled, and tools such as
    ``torch.fx`` look at the class.

    Args:
        module: whose own forward calls the function.
        products: what is called instead.
    """
    setattr(module, PRODUCTS, products)
    module.__class__ = subclass(_with_products, type(module))


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`.

    Args:
        module: as given to it.
    """
    delattr(module, PRODUCTS)
    kind = type(module).__bases__[0]
    if type(module) is subclass(_with_products, kind):  # else its class was changed since; without products it is float
        module.__class__ = kind


def _with_products(kind: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (the module's own)
        products = self._modules.get(PRODUCTS)
        if products is None:
            return kind.forward(self, *args, **kwargs)
        calls: list[bool] = []
        with _Replaced(products, calls):  # type: ignore[arg-type]  # torch does not know the class
            result = kind.forward(self, *args, **kwargs)
        if not calls:  # else a model would go on with float products, without a sign
            raise OrderError(
                f"{products.name}: expected attention to call torch's {FUNCTION}, as it did when the model was "
                "prepared, found that it computes the products otherwise. Set the attention implementation back "
                "(transformers: model.set_attn_implementation('sdpa')), or prepare the float model as it is now."
            )
        return result

    return (kind,), {"forward": forward}


def _accept_float_checkpoint(
    products: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_rest: Any,  # noqa: ANN401  (torch passes five more that are not needed)
) -> None:
    """A float checkpoint has nothing for quantizers, which keep their values."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + key: value for key, value in products.state_dict().items()})
