"""Trace one forward of a float model: its layers, its attention, and the ops outside of them that stay float.

No graph is captured. Module hooks see the layers; a ``TorchFunctionMode`` sees every functional call, so that a
residual add inside a model's ``forward`` is found as surely as a pooling module; ``nipq.prepare.readers`` sees what
reads which tensor. The products inside attention are counted like layers: the weight of one is the key, that of the
other the value. A second forward, of a copy in training mode, tells which ReLUs have no other reader there either.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from nipq.errors import NotQuantizableError
from nipq.nn.attention import FUNCTION, PRODUCTS
from nipq.nn.kinds import channel_dim, is_supported, is_table, weight_uses
from nipq.nn.layers import LayerSpec
from nipq.nn.relu import cap_of, neighbours
from nipq.prepare.batches import ExampleInputs, call_model, copy_of, evaluating, tensors_in
from nipq.prepare.probe import Call, has_own_forward
from nipq.prepare.readers import ReaderMode, forwards_watched, held, parameters_watched

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
#: Ways from a tensor's values that no operation of torch sees.
_UNSEEN = frozenset(("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "array", "dlpack"))
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
        own_calls: arguments of the first call of each layer with a forward of its own, by the layer's name.
        by_hand: names of the supported layers whose forward was called past their hooks, as ``layer.forward(x)``.
        weight_readers: names of the modules that read a layer's weight or bias outside of it, by the layer's name.
        past: names of the layers whose weight or bias is read without a look at any module that holds it.
        written: names of the layers whose weight or bias the forward writes into.
        unused_norms: full names of batch norms with running statistics that did not run.
    """

    layers: tuple[LayerSpec, ...]
    unquantized_ops: tuple[UnquantizedOp, ...]
    unused: tuple[str, ...]
    shared: dict[str, tuple[str, ...]]
    attention: tuple[Attention, ...] = ()
    own_calls: Mapping[str, Call] = field(default_factory=dict)
    by_hand: frozenset[str] = frozenset()
    weight_readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    past: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    unused_norms: tuple[str, ...] = ()

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

    Counts are per sample. The batch size is the first axis of the inputs; where inputs differ in it, of most inputs and
    outputs. Where a ReLU may be left out in training, a copy of the model runs in training mode, too.

    Args:
        model: a float model; nothing about it is changed.
        example_inputs: the model's inputs; a batch of one is enough.

    Returns:
        The layers in order of execution, the unquantized ops, and the layers that did not run.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs, if they hold no tensor, or if their batch size
            is not clear.
    """
    tensors = list(tensors_in(example_inputs))
    if all(tensor.ndim == 0 for tensor in tensors):
        raise NotQuantizableError(
            "trace: expected example inputs with a batch axis, found none. "
            "Pass a batch such as torch.zeros(1, 3, 224, 224)."
        )
    watcher = _Watcher(model, example_inputs)
    try:
        with evaluating(model):
            watcher.run(model, example_inputs)
    except Exception as error:
        where = watcher.names[watcher.stack[-1]] if watcher.stack else ""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise NotQuantizableError(
            f"{where or type(model).__name__}: expected a forward that accepts the example inputs, found that it fails "
            f"on shapes {shapes}: {error}. Pass inputs that the float model accepts."
        ) from error
    batch = _batch_size(example_inputs, watcher)
    relus = {name: relu for layer, name in watcher.ran() if (relu := watcher.foldable_relu(model, layer))}
    if relus:
        relus = dict(relus.items() & _relus_of_training(model, example_inputs).items())
    multiplying = {id(layer._parameters.get("weight")): name for layer, name in watcher.ran() if not is_table(layer)}
    layers = tuple(_spec(layer, watcher, batch, multiplying, relus) for layer in watcher.layers)
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
    attention = tuple(calls.found(name, batch) for name, calls in watcher.attention.items())
    supported = {name: module for module, name in watcher.names.items() if is_supported(module)}
    return Trace(
        layers,
        ops,
        unused,
        shared,
        attention,
        own_calls=watcher.own_calls,
        by_hand=frozenset(name for name, module in supported.items() if module in watcher.by_hand),
        weight_readers={name: found for name, layer in supported.items() if (found := watcher.readers_outside(layer))},
        past=frozenset(name for name, layer in supported.items() if watcher.reads_past(layer)),
        written=frozenset(
            name
            for name, layer in supported.items()
            if not watcher.readers.written.isdisjoint(map(id, layer._parameters.values()))
        ),
        unused_norms=tuple(
            name
            for module, name in watcher.names.items()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and not watcher.calls[module]
        ),
    )


def _spec(
    layer: nn.Module, watcher: _Watcher, batch: int, multiplying: Mapping[int, str], relus: Mapping[str, str]
) -> LayerSpec:
    calls, name = watcher.layers[layer], watcher.names[layer]
    assert isinstance(layer.weight, Tensor)
    return LayerSpec(
        name=name,
        kind=type(layer).__name__,
        macs=layer.weight.numel() * calls.positions // batch,
        weight_count=layer.weight.numel(),
        activation_count=calls.inputs // batch,
        output_count=calls.outputs // batch,
        calls=calls.calls,
        batchnorm=watcher.foldable_batchnorm(layer),
        is_input=calls.is_input,
        relu=relus.get(name),
        tied_to=multiplying.get(id(layer._parameters.get("weight"))) if is_table(layer) else None,
        is_table=is_table(layer),
    )


def _batch_size(example_inputs: ExampleInputs, watcher: _Watcher) -> int:
    """Number of samples in the example inputs."""
    if not isinstance(example_inputs, Tensor) and len(example_inputs):
        first = next(iter(example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs))
        if isinstance(first, list) and len(first) == watcher.outputs_listed:
            return len(first)  # detectors take a list of images, and give a list of results
    inputs = [tensor for tensor in tensors_in(example_inputs) if tensor.ndim]
    sized = [len(tensor) for tensor in inputs if tensor.numel() > 1]  # one number, such as a time step, serves a batch
    votes = Counter(sized or [len(tensor) for tensor in inputs])
    if len(votes) > 1:
        votes.update(shape[0] for shape in watcher.outputs if len(shape) and shape[0] in votes and shape.numel() > 1)
    (size, most), *others = votes.most_common(2)
    if others and others[0][1] == most:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(example_inputs)]
        raise NotQuantizableError(
            f"trace: expected example inputs that show the batch size, found the shapes {shapes}, of which as many "
            f"begin with {size} as with {others[0][0]}. Pass a batch of one, or one whose size is no other axis's."
        )
    return max(size, 1)


def _relus_of_training(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """Layer -> the ReLU whose only reader it is in training mode; none if the model cannot be traced there.

    Batch norms stay in evaluation mode: a batch of one is enough, and they read what they read.
    """
    shared = {id(tensor): tensor for m in model.modules() if is_supported(m) for tensor in m._parameters.values()}
    try:
        clone, inputs = copy_of(model, shared), copy.deepcopy(example_inputs)
        clone.train()
        for module in clone.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        watcher = _Watcher(clone, inputs)
        with evaluating(model):  # which a closure in the copy may lead to
            watcher.run(clone, inputs)
    except Exception:  # the forward may want targets, and fail in any way
        return {}
    return {name: relu for layer, name in watcher.ran() if (relu := watcher.foldable_relu(clone, layer))}


@contextmanager
def _random_states_kept(model: nn.Module) -> Iterator[None]:
    """Leave the generators of torch, Python and numpy as they are."""
    numpy, python = sys.modules.get("numpy"), random.getstate()
    arrays = numpy.random.get_state() if numpy is not None else None
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


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
    #: Ids of the last input and output, and whether the channels of the output are its second axis.
    input: int | None = None
    output: int | None = None
    channels_second: bool = False


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
    """Hooks and modes of one traced forward."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        #: Modules with hooks of the user's, which may read or replace what comes in or out.
        self.hooked_before = {module for module in self.names if module._forward_pre_hooks}
        self.hooked_behind = {module for module in self.names if module._forward_hooks}
        self.own_forward = {module for module in self.names if is_supported(module) and has_own_forward(module)}
        self.stack: list[nn.Module] = []
        self.layers: dict[nn.Module, _LayerCalls] = {}
        self.own_calls: dict[str, Call] = {}
        self.ops: Counter[tuple[str, str]] = Counter()
        self.readers = ReaderMode(self.stack, self.names)
        self.by_hand: set[nn.Module] = set()
        #: Parameters that were looked up on a module from outside of it: the module and the parameter's name.
        self.looked_up: set[tuple[nn.Module, str]] = set()
        #: Ids of parameters that were looked up so, or on a module that is no layer.
        self.reached: set[int] = set()
        #: Outputs of layers and ReLUs by their ids, and the versions of these that left them.
        self.made: dict[int, Tensor] = {}
        self.versions: dict[int, int | None] = {}
        self.held: set[int] = set()
        self.batchnorm_inputs: dict[int, nn.Module] = {}
        self.relu_outputs: dict[int, nn.Module] = {}
        #: How often each batch norm and each ReLU was called.
        self.calls: Counter[nn.Module] = Counter()
        #: Names of the modules around a layer or a ReLU when it was called last.
        self.around: dict[nn.Module, list[str]] = {}
        #: Tensors that no layer has touched; "input" when the model's own input is in them.
        self.origin: dict[int, Literal["input", "constant"]] = {
            id(tensor): "constant" for tensor in (*model.parameters(), *model.buffers())
        }
        self.origin |= {id(tensor): "input" for tensor in tensors_in(example_inputs)}
        #: Names of the layers that read a tensor in one state of it, by its id and version.
        self.layers_on: dict[tuple[int, int | None], dict[str, None]] = {}
        self.attention: dict[str, _AttentionCalls] = {}
        self.outputs: list[torch.Size] = []
        #: Length of the output, if that is a list.
        self.outputs_listed: int | None = None
        self.keep: list[object] = []  # ids stay unique only while the tensors live

    def run(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        """Call the model, without gradients; its modules are in the mode that they are to be watched in."""
        for module in self.names:
            if is_supported(module) or isinstance(module, _BatchNorm):
                self.readers.watch(module, (*module._parameters.values(), *module._buffers.values()))
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self.leave, with_kwargs=True))
        called = (m for m in self.names if is_supported(m) or isinstance(m, _BatchNorm) or cap_of(m) is not None)
        try:
            with (
                _random_states_kept(model),
                torch.no_grad(),
                parameters_watched(self.names, self.looks_up),
                forwards_watched(called, self.stack, self.calls_by_hand),
                self,
                self.readers,
            ):
                output = call_model(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.outputs = [tensor.shape for tensor in tensors_in(output)]
        self.outputs_listed = len(output) if isinstance(output, list) else None
        self.keep.clear()
        self.readers.keep.clear()
        self.held = held(self.made)  # the output, too, holds what is in it

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        results = list(tensors_in(result))
        operation = _operation_of(func)
        operands = [*tensors_in(args), *tensors_in(kwargs or {})]
        if operation in _UNSEEN:
            for tensor in operands:
                self.readers.read(tensor)
        if not results:
            return result  # shape, dim(), dtype
        inner = self.stack[-1] if self.stack else None
        where = "" if inner is None else self.names[inner]
        self.keep.append((operands, results))
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

    def looks_up(self, module: nn.Module, key: str) -> None:
        if not (is_supported(module) and module in self.stack):
            self.reached.add(id(module._parameters.get(key)))
            if module not in self.stack:
                self.looked_up.add((module, key))

    def calls_by_hand(self, module: nn.Module) -> None:
        self.by_hand.add(module)
        self.calls[module] += 1

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_supported(module) or cap_of(module) is not None:
            self.around[module] = [self.names[outer] for outer in self.stack]
        self.stack.append(module)
        if not (is_supported(module) or isinstance(module, _BatchNorm)):
            return
        x = next(tensors_in((args, kwargs)), None)
        self.keep.append(x)
        if isinstance(module, _BatchNorm):
            self.calls[module] += 1
            # A subclass with a forward of its own may do more than normalise.
            normalises = type(module).forward is _BatchNorm.forward and module.running_mean is not None
            if x is not None and normalises and not module.training and self.unchanged(x):
                self.batchnorm_inputs[id(x)] = module
            return
        calls = self.layers.setdefault(module, _LayerCalls())
        if not calls.calls and module in self.own_forward:
            self.own_calls[self.names[module]] = Call(args, kwargs)
        if x is None:
            calls.is_input = False
            return
        self.layers_on.setdefault((id(x), _version(x)), {})[self.names[module]] = None
        calls.is_input &= self.origin.get(id(x)) == "input" and not is_table(module)
        calls.inputs += 0 if is_table(module) else x.numel()  # numbers of rows have no bits
        calls.input = id(x) if self.unchanged(x) else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self.stack.pop()
        y = next(tensors_in(output), None)
        if y is None or not (is_supported(module) or cap_of(module) is not None):
            if is_supported(module):
                self.layers[module].calls += 1
            return
        self.made[id(y)], self.versions[id(y)] = y, _version(y)
        if not is_supported(module):
            self.relu_outputs[id(y)] = module
            self.calls[module] += 1
            return
        calls, x = self.layers[module], next(tensors_in((args, kwargs)), None)
        calls.calls += 1
        calls.outputs += y.numel()
        calls.positions += 0 if x is None else weight_uses(module, x, y)
        calls.output, calls.channels_second = id(y), y.ndim + channel_dim(module) == 1

    def unchanged(self, tensor: Tensor) -> bool:
        """Return whether a layer or a ReLU made a tensor and nothing wrote into it, or into a view of it, since."""
        version = self.versions.get(id(tensor))
        return version is not None and version == _version(tensor)

    def ran(self) -> Iterator[tuple[nn.Module, str]]:
        """Layers in the order of execution, and their names."""
        return ((layer, self.names[layer]) for layer in self.layers)

    def readers_outside(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the modules that read the values of the layer's weight or bias without calling the layer."""
        found = (self.readers.outside.get(id(parameter), ()) for parameter in layer._parameters.values())
        return tuple(sorted(set().union(*found)))

    def reads_past(self, layer: nn.Module) -> bool:
        """Return whether one of these did not look the parameter up on any module."""
        return any(
            id(parameter) in self.readers.outside and id(parameter) not in self.reached
            for parameter in layer._parameters.values()
        )

    def foldable_batchnorm(self, layer: nn.Module) -> str | None:
        """Name of the batch norm that is the only reader of the layer's output, and reads nothing else."""
        calls, name = self.layers[layer], self.names[layer]
        y, norm = calls.output, self.batchnorm_inputs.get(-1 if calls.output is None else calls.output)
        if y is None or norm is None or calls.calls != 1 or self.calls[norm] != 1 or not calls.channels_second:
            return None
        alone = self.readers.of[y] - {name} == {self.names[norm]} and y not in self.held
        hooked = layer in self.hooked_behind or norm in self.hooked_before | self.hooked_behind
        own = (*norm._parameters.values(), *norm._buffers.values(), *layer._parameters.values())
        looked_at = any(id(tensor) in self.readers.outside for tensor in own) or any(
            module is norm or (module is layer and key == "bias") for module, key in self.looked_up
        )
        return self.names[norm] if alone and not hooked and not looked_at and layer not in self.by_hand else None

    def foldable_relu(self, model: nn.Module, layer: nn.Module) -> str | None:
        """Name of the ReLU whose only reader is the layer, where the layer reads nothing else."""
        calls, name = self.layers[layer], self.names[layer]
        relu = self.relu_outputs.get(-1 if calls.input is None else calls.input)
        if relu is None or calls.input is None or calls.calls != 1 or self.calls[relu] != 1:
            return None
        if layer in self.by_hand | self.own_forward or "folded_into" in vars(relu):
            return None  # a forward of its own may take the same tensor as another argument, too
        first = self.names[relu]
        if self.readers.of[calls.input] - {first} != {name} or calls.input in self.held:  # in place, it reads its own
            return None
        between = neighbours(model, first, name)
        if between is None:
            return None
        before, behind = [between.common, *between.ending], [between.common, *between.beginning]
        as_written = _ends_with(self.around[relu], before) and _ends_with(self.around[layer], behind)
        return first if as_written else None


def _ends_with(names: Sequence[str], end: Sequence[str]) -> bool:
    return list(names[-len(end) :]) == list(end)


def _version(tensor: Tensor) -> int | None:
    """Count of the writes into a tensor and its views; None where torch keeps none."""
    return None if tensor.is_inference() else tensor._version
