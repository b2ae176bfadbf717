"""The products inside attention, counted like layers: the weight of one is the key, that of the other the value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nipq.nn.attention import PRODUCTS
from nipq.nn.layers import LayerSpec

#: Names of both operands, by the kind of product.
PRODUCT_OPERANDS = {"QueryKey": ("query", "key"), "ProbabilityValue": ("probability", "value")}


@dataclass(frozen=True)
class Attention:
    """A module that calls torch's function for attention.

    Attributes:
        name: full name of the module.
        place: how many layers ran before its first call.
        scores: facts of query times key; its input is the query.
        mix: facts of probability times value; its input is the probability.
        within: names of the modules whose forward ran around its own.
    """

    name: str
    place: int
    scores: LayerSpec
    mix: LayerSpec
    within: frozenset[str] = frozenset()


@dataclass
class AttentionCalls:
    """Running sums over the calls from one module, over the whole batch.

    Attributes:
        place: how many layers ran before the first call.
        within: names of the modules whose forward ran around it.
    """

    place: int
    within: set[str] = field(default_factory=set)
    calls: int = 0
    queries: int = 0
    keys: int = 0
    values: int = 0
    probabilities: int = 0
    score_macs: int = 0
    mix_macs: int = 0
    outputs: int = 0

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], within: Iterable[str]) -> None:
        """Count one call.

        Args:
            args: positional arguments of the function.
            kwargs: named ones.
            within: names of the modules whose forward runs around it.
        """
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        query, key, value = (given[name] for name in ("query", "key", "value"))
        assert isinstance(query, Tensor)
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        self.calls += 1
        self.within.update(within)
        self.queries += query.numel()
        self.keys += key.numel()
        self.values += value.numel()
        self.probabilities += pairs
        self.score_macs += pairs * query.shape[-1]
        self.mix_macs += pairs * value.shape[-1]
        self.outputs += math.prod(query.shape[:-1]) * value.shape[-1]

    def found(self, name: str, batch: int) -> Attention:
        """The facts of both products.

        Args:
            name: full name of the module.
            batch: samples in the batch.
        """
        inside = ".".join(filter(None, (name, PRODUCTS)))
        common: dict[str, Any] = {"weight_count": 0, "calls": self.calls, "batchnorm": None, "is_input": False}
        counts = ("macs", "activation_count", "other_count", "output_count")

        def product(part: str, kind: str, *sums: int) -> LayerSpec:
            each: dict[str, Any] = {count: total // batch for count, total in zip(counts, sums, strict=True)}
            return LayerSpec(name=f"{inside}.{part}", kind=kind, **each, **common)

        scores = product("scores", "QueryKey", self.score_macs, self.queries, self.keys, self.probabilities)
        mix = product("mix", "ProbabilityValue", self.mix_macs, self.probabilities, self.values, self.outputs)
        return Attention(name, self.place, scores, mix, frozenset(self.within))
