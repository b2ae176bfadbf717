"""Trace one forward of a float model: its layers, its attention, and the ops outside of them that stay float.

No graph is captured. Module hooks see the layers; a ``TorchFunctionMode`` sees every functional call, so that a
residual add inside a model's ``forward`` is found as surely as a pooling module. The products inside attention are
counted like layers: the weight of one is the key, that of the other the value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from nipq.errors import NotQuantizableError
from nipq.nn.attention import FUNCTION, PRODUCTS
from nipq.nn.kinds import is_supported, is_table, weight_uses
from nipq.nn.layers import LayerSpec
from nipq.nn.relu import cap_of, reads_in_sequence
from nipq.prepare.batches import ExampleInputs, call_model, evaluating, tensors_in

#: Names of torch's operators -> the plain ones.
_ALIASES = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul"}
_ALIASES |= {"truediv": "div", "itruediv": "div", "rtruediv": "div", "rmatmul": "matmul"}

#: Operations that are reported where they take two activations.
BETWEEN_ACTIVATIONS = ("add", "sub", "mul", "div")
# Why a functional op stays float, by the last part of its torch name. ReLU-like clamps, reshapes and concatenations are
# left out: they do no arithmetic that the next quantizer would not see.
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
#: Operation -> why it stays float.
REASONS = {name: reason for reason, names in _OPERATIONS.items() for name in names.split()}
#: Names of both operands, by the kind of product.
PRODUCT_OPERANDS = {"QueryKey": ("query", "key"), "ProbabilityValue": ("probability", "value")}


@dataclass(frozen=True)
class UnquantizedOp:
    """An operation that stays float, and why.

    Attributes:
        name: full name of the innermost module that calls it; empty for the model itself.
        operation: its name, such as ``"add"``.
        reason: why it stays float.
        count: how often one forward calls it there.
    """

    name: str
    operation: str
    reason: str
    count: int = 1


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


@dataclass(frozen=True)
class Trace:
    """Layers, attention and unquantized ops of one forward.

    Attributes:
        layers: facts of every supported layer that ran, in order of first execution.
        unquantized_ops: operations outside of them.
        unused: full names of supported layers that did not run.
        shared: names of the layers that read the same tensor, by the name of each of them.
        attention: modules that call torch's function for attention.
    """

    layers: tuple[LayerSpec, ...]
    unquantized_ops: tuple[UnquantizedOp, ...]
    unused: tuple[str, ...]
    shared: dict[str, tuple[str, ...]]
    attention: tuple[Attention, ...] = ()

    def ordered(self, *, products: bool) -> list[LayerSpec]:
        """Facts of the layers that can be quantized, in order of first execution.

        Args:
            products: whether the products inside attention are among them.
        """
        found = list(self.layers)
        for attention in reversed(self.attention if products else ()):
            found[attention.place : attention.place] = [attention.scores, attention.mix]
        return found


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Run the model once in evaluation mode, without gradients, and record its layers and ops.

    Counts are per sample: the batch size is the first axis of the first example tensor.

    Args:
        model: a float model; nothing about it is changed.
        example_inputs: the model's inputs; a batch of one is enough.

    Returns:
        The layers in order of execution, the unquantized ops, and the layers that did not run.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs, or they hold no tensor.
    """
    tensors = list(tensors_in(example_inputs))
    if not tensors or tensors[0].ndim == 0:
        raise NotQuantizableError(
            "trace: expected example inputs with a batch axis, found none. "
            "Pass a batch such as torch.zeros(1, 3, 224, 224)."
        )
    watcher = _Watcher(model, example_inputs)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watcher.leave, with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad(), watcher:
            output = call_model(model, example_inputs)
    except Exception as error:
        where = watcher.names[watcher.stack[-1]] if watcher.stack else ""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise NotQuantizableError(
            f"{where or type(model).__name__}: expected a forward that accepts the example inputs, found that it fails "
            f"on shapes {shapes}: {error}. Pass inputs that the float model accepts."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors_in(output):
        watcher.readers.setdefault(id(tensor), set()).add("")  # the caller of the model
    multiplying = {id(layer.weight): name for layer, name in watcher.multiplying()}
    layers = tuple(_spec(model, layer, watcher, tensors[0].shape[0], multiplying) for layer in watcher.layers)
    folded = {spec.batchnorm for spec in layers}
    ops = tuple(
        UnquantizedOp(name, operation, REASONS[operation], count)
        for (name, operation), count in watcher.ops.items()
        if name not in folded
    )
    unused = tuple(
        name for module, name in watcher.names.items() if is_supported(module) and module not in watcher.layers
    )
    shared = {name: tuple(names) for names in watcher.layers_on.values() for name in names if len(names) > 1}
    attention = tuple(calls.found(name, tensors[0].shape[0]) for name, calls in watcher.attention.items())
    return Trace(layers, ops, unused, shared, attention)


def _spec(
    model: nn.Module, layer: nn.Module, watcher: _Watcher, batch: int, multiplying: Mapping[int, str]
) -> LayerSpec:
    calls = watcher.layers[layer]
    assert isinstance(layer.weight, Tensor)
    return LayerSpec(
        name=watcher.names[layer],
        kind=type(layer).__name__,
        macs=layer.weight.numel() * calls.positions // batch,
        weight_count=layer.weight.numel(),
        activation_count=calls.inputs // batch,
        output_count=calls.outputs // batch,
        calls=calls.calls,
        batchnorm=watcher.foldable_batchnorm(layer),
        is_input=calls.is_input,
        relu=watcher.foldable_relu(model, layer),
        tied_to=multiplying.get(id(layer.weight)) if is_table(layer) else None,
        is_table=is_table(layer),
    )


def _operation_of(func: Callable[..., Any]) -> str:
    """Plain name of a torch function: ``add`` for ``Tensor.__iadd__`` and ``Tensor.add_`` alike."""
    name = str(resolve_name(func) or getattr(func, "__name__", "?")).rsplit(".", 1)[-1].strip("_")
    return _ALIASES.get(name, name)


@dataclass
class _LayerCalls:
    """Running sums over the calls of one layer."""

    calls: int = 0
    inputs: int = 0
    outputs: int = 0
    positions: int = 0
    is_input: bool = True
    input: Tensor | None = None
    output: Tensor | None = None


@dataclass
class _AttentionCalls:
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
        """Count one call of the function, inside the forwards of the named modules."""
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
        """The facts of both products for the module of that name, per sample of a batch."""
        inside = ".".join(filter(None, (name, PRODUCTS)))
        common: dict[str, Any] = {"weight_count": 0, "calls": self.calls, "batchnorm": None, "is_input": False}
        counts = ("macs", "activation_count", "other_count", "output_count")

        def product(part: str, kind: str, *sums: int) -> LayerSpec:
            each: dict[str, Any] = {count: total // batch for count, total in zip(counts, sums, strict=True)}
            return LayerSpec(name=f"{inside}.{part}", kind=kind, **each, **common)

        scores = product("scores", "QueryKey", self.score_macs, self.queries, self.keys, self.probabilities)
        mix = product("mix", "ProbabilityValue", self.mix_macs, self.probabilities, self.values, self.outputs)
        return Attention(name, self.place, scores, mix, frozenset(self.within))


class _Watcher(TorchFunctionMode):
    """Hooks and function mode of one traced forward."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.layers: dict[nn.Module, _LayerCalls] = {}
        self.ops: Counter[tuple[str, str]] = Counter()
        #: Readers of a tensor, by its id: names of innermost modules.
        self.readers: dict[int, set[str]] = {}
        self.batchnorm_inputs: dict[int, str] = {}
        self.batchnorm_calls: Counter[str] = Counter()
        self.relu_outputs: dict[int, str] = {}
        self.relu_calls: Counter[str] = Counter()
        #: Tensors that no layer has touched; "input" when the model's own input is in them.
        self.origin: dict[int, Literal["input", "constant"]] = {
            id(tensor): "constant" for tensor in (*model.parameters(), *model.buffers())
        }
        self.origin |= {id(tensor): "input" for tensor in tensors_in(example_inputs)}
        #: Names of the layers that read a tensor in one state of it, by its id and version.
        self.layers_on: dict[tuple[int, int], dict[str, None]] = {}
        self.attention: dict[str, _AttentionCalls] = {}
        self.keep: list[object] = []  # ids stay unique only while the tensors live

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        results = list(tensors_in(result))
        if not results:
            return result  # shape, dim(), dtype: not a reader of the values
        inner = self.stack[-1] if self.stack else None
        where = "" if inner is None else self.names[inner]
        operands = [*tensors_in(args), *tensors_in(kwargs or {})]
        self.keep.append((operands, results))
        for tensor in operands:
            self.readers.setdefault(id(tensor), set()).add(where)
        operation = _operation_of(func)
        # Ops inside a layer are part of it, except attention, which its quantizers would not see.
        if inner is not None and is_supported(inner) and operation != FUNCTION:
            return self._made(results, None, result)
        if operation == FUNCTION:
            within = [self.names[module] for module in self.stack[:-1]]
            self.attention.setdefault(where, _AttentionCalls(len(self.layers))).add(args, kwargs or {}, within)
        if operation in REASONS and (len(operands) > 1 or operation not in BETWEEN_ACTIVATIONS):
            self.ops[where, operation] += 1
        origins = {self.origin.get(id(tensor)) for tensor in operands}
        if None in origins or operation.startswith("embedding"):
            return self._made(results, None, result)
        return self._made(results, "input" if "input" in origins else "constant", result)

    def _made(self, results: list[Tensor], origin: Literal["input", "constant"] | None, result: object) -> Any:  # noqa: ANN401
        for tensor in results:
            if origin is None:
                self.origin.pop(id(tensor), None)  # an operation in place may have changed it
            else:
                self.origin[id(tensor)] = origin
        return result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(module)
        if not (is_supported(module) or isinstance(module, _BatchNorm)):
            return
        (x, *_) = tensors_in((args, kwargs))
        self.keep.append(x)
        if isinstance(module, _BatchNorm):
            self.batchnorm_calls[self.names[module]] += 1
            # A subclass with a forward of its own may do more than normalise.
            if type(module).forward is _BatchNorm.forward and module.running_mean is not None:
                self.batchnorm_inputs[id(x)] = self.names[module]
            return
        version = 0 if x.is_inference() else x._version
        self.layers_on.setdefault((id(x), version), {})[self.names[module]] = None
        calls = self.layers.setdefault(module, _LayerCalls())
        calls.is_input &= self.origin.get(id(x)) == "input" and not is_table(module)
        calls.inputs += 0 if is_table(module) else x.numel()  # numbers of rows have no bits
        calls.input = x

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self.stack.pop()
        if cap_of(module) is not None:
            (y,) = tensors_in(output)
            self.keep.append(y)
            self.relu_outputs[id(y)] = self.names[module]
            self.relu_calls[self.names[module]] += 1
        if is_supported(module):
            calls = self.layers[module]
            (x, *_), (y, *_) = tensors_in((args, kwargs)), tensors_in(output)
            calls.calls += 1
            calls.outputs += y.numel()
            calls.positions += weight_uses(module, x, y)
            calls.output = y

    def foldable_batchnorm(self, layer: nn.Module) -> str | None:
        """Name of the batch norm that is the only reader of the layer's output, and reads nothing else."""
        calls = self.layers[layer]
        y = calls.output
        if y is None or calls.calls != 1 or (not hasattr(layer, "kernel_size") and y.ndim != 2):
            return None  # behind a linear layer, channels of a batch norm are the features only in two dimensions
        name = self.batchnorm_inputs.get(id(y))
        alone = name is not None and self.readers.get(id(y)) == {name} and self.batchnorm_calls[name] == 1
        return name if alone else None

    def multiplying(self) -> Iterator[tuple[nn.Module, str]]:
        """Layers that multiply with their weight, and their names."""
        return ((layer, self.names[layer]) for layer in self.layers if not is_table(layer))

    def foldable_relu(self, model: nn.Module, layer: nn.Module) -> str | None:
        """Name of the ReLU whose only reader is the layer, where the layer reads nothing else."""
        calls, name = self.layers[layer], self.names[layer]
        relu = self.relu_outputs.get(id(calls.input))
        if relu is None or calls.calls != 1 or self.relu_calls[relu] != 1:
            return None
        readers = self.readers[id(calls.input)] - {relu}  # in place, it reads what it makes
        return relu if readers == {name} and reads_in_sequence(model, relu, name) else None
