"""One watched forward of a float model: which layers run on what, what computes outside them, and which batch norm a
layer feeds.

No graph is captured. Module hooks see the layers; a ``TorchFunctionMode`` sees every functional call, so that a residual
add inside somebody's ``forward`` is found as surely as a pooling module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from nipq.errors import NotQuantizableError
from nipq.nn.layers import SUPPORTED, LayerSpec

#: What a model is called with: one tensor, several positional ones, or keywords.
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Functional pieces worth a line, by the last part of their torch name. ReLU-like clamps, reshapes and concatenations are
# left out: they do no arithmetic that the next quantizer would not see.
_SUM = "sums stay float; the next layer quantizes what it reads"
_PRODUCT = "products of two activations stay float; the next layer quantizes what it reads"
_POOL = "pooling has no weights; it stays float between two quantizers"
_SMOOTH = "smooth activation functions stay float; the next layer quantizes their result"
_ATTENTION = "attention products stay float"
_NORM = "normalisation stays float (a batch norm is folded when it alone follows a convolution)"
_REASONS: dict[str, str] = {
    **dict.fromkeys(("add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "__rsub__"), _SUM),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__imul__", "__rmul__", "div", "__truediv__"), _PRODUCT),
    **dict.fromkeys(
        (
            *("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"),
            *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
            *("boolean_dispatch", "interpolate"),
        ),
        _POOL,
    ),
    **dict.fromkeys(("silu", "gelu", "hardswish", "sigmoid", "hardsigmoid", "tanh", "softmax", "mish", "elu"), _SMOOTH),
    **dict.fromkeys(
        ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
        _ATTENTION,
    ),
    "multi_head_attention_forward": "torch's fused attention reads its projections' weights past their modules",
    **dict.fromkeys(("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"), _NORM),
    "embedding": "table look-ups have no input to quantize; the table stays float",
}


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


@dataclass(frozen=True)
class Trace:
    """What one forward did.

    Attributes:
        layers: facts of every supported layer that ran, in order of first execution.
        float_pieces: what computes outside them.
        unused: full names of supported layers that did not run.
    """

    layers: tuple[LayerSpec, ...]
    float_pieces: tuple[FloatPiece, ...]
    unused: tuple[str, ...]


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    """Call a model with example inputs in any of the accepted forms."""
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs)


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class _LayerCalls:
    """Running sums over the calls of one layer."""

    def __init__(self) -> None:
        self.calls = 0
        self.inputs = self.outputs = self.positions = 0
        self.is_input = False
        self.output_id: int | None = None


class _Watcher(TorchFunctionMode):
    """Hooks and function mode of one traced forward."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.model_inputs = {id(tensor) for tensor in _tensors(example_inputs)}
        self.stack: list[nn.Module] = []
        self.layers: dict[nn.Module, _LayerCalls] = {}
        self.readers: dict[int, list[str]] = {}
        self.pieces: dict[tuple[str, str], int] = {}
        self.batchnorms: dict[int, str] = {}
        self.batchnorm_calls: Counter[str] = Counter()
        self.keep: list[object] = []  # ids stay unique only while the tensors live

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None  # noqa: ANN401, ARG002
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if not any(True for _ in _tensors(result)):
            return result  # shape, dim(), dtype: not a reader of the values
        inner = self.stack[-1] if self.stack else None
        where = "" if inner is None else self.names[inner]
        operands = [*_tensors(args), *_tensors(kwargs or {})]
        for tensor in operands:
            self.readers.setdefault(id(tensor), []).append(where)
        self.keep.append((operands, result))
        if not isinstance(inner, SUPPORTED):
            operation = (resolve_name(func) or getattr(func, "__name__", "?")).rsplit(".", 1)[-1]
            if operation in _REASONS:
                self.pieces[where, operation] = self.pieces.get((where, operation), 0) + 1
        return result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(module)
        if isinstance(module, _BATCHNORM):
            self.batchnorm_calls[self.names[module]] += 1
            for tensor in _tensors((args, kwargs)):
                self.batchnorms[id(tensor)] = self.names[module]
                self.keep.append(tensor)
        if isinstance(module, SUPPORTED):
            calls = self.layers.setdefault(module, _LayerCalls())
            (x, *_) = _tensors((args, kwargs))
            # Reading the model's input at one remove (normalised, sliced) counts as well: nothing quantized came before.
            calls.is_input = calls.is_input or id(x) in self.model_inputs or len(self.layers) == 1
            calls.inputs += x.numel()
            self.keep.append(x)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self.stack.pop()
        if isinstance(module, SUPPORTED):
            calls = self.layers[module]
            (x, *_), (y, *_) = _tensors((args, kwargs)), _tensors(output)
            calls.calls += 1
            calls.outputs += y.numel()
            calls.positions += _positions(module, x, y)
            calls.output_id = id(y)
            self.keep.append(y)


def _positions(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """How often the whole weight is used in one call, over the whole batch."""
    if isinstance(layer, nn.Linear):
        return x.numel() // layer.in_features
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return x.numel() // layer.in_channels  # every input pixel meets the whole kernel
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return y.numel() // layer.out_channels


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Run the model once in evaluation mode, without gradients, and note what it does.

    Counts are per sample: the batch size is the first axis of the first example tensor.

    Args:
        model: a float model; nothing about it is changed.
        example_inputs: what the model is called with; a batch of one is enough.

    Returns:
        The layers in order of execution, the float pieces, and the layers that did not run.

    Raises:
        NotQuantizableError: if the forward fails on the example inputs, or they hold no tensor.
    """
    tensors = list(_tensors(example_inputs))
    if not tensors or tensors[0].ndim == 0:
        raise NotQuantizableError(
            "trace: expected example inputs with a batch axis, found none. Pass a batch such as torch.zeros(1, 3, 224, 224)."
        )
    batch = tensors[0].shape[0]
    watcher = _Watcher(model, example_inputs)
    modes = {module: module.training for module in model.modules()}
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watcher.leave, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad(), watcher:
            call_model(model, example_inputs)
    except Exception as error:
        where = watcher.names[watcher.stack[-1]] if watcher.stack else ""
        raise NotQuantizableError(
            f"{where or type(model).__name__}: the model's forward failed on the example inputs of shape "
            f"{[tuple(tensor.shape) for tensor in tensors]}: {error}. Pass inputs that the float model accepts."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    layers = tuple(_spec(layer, calls, watcher, batch) for layer, calls in watcher.layers.items())
    folded = {spec.batchnorm for spec in layers}
    pieces = tuple(
        FloatPiece(name, operation, _REASONS[operation], count)
        for (name, operation), count in watcher.pieces.items()
        if name not in folded
    )
    unused = tuple(
        name for module, name in watcher.names.items() if isinstance(module, SUPPORTED) and module not in watcher.layers
    )
    return Trace(layers, pieces, unused)


def _spec(layer: nn.Module, calls: _LayerCalls, watcher: _Watcher, batch: int) -> LayerSpec:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    follower = None
    if calls.calls == 1 and calls.output_id is not None:
        # Folding is exact only if nothing but the batch norm reads the output, and it reads nothing else.
        candidate = watcher.batchnorms.get(calls.output_id)
        if candidate is not None and watcher.batchnorm_calls[candidate] == 1:
            readers = set(watcher.readers.get(calls.output_id, []))
            follower = candidate if readers == {candidate} else None
    return LayerSpec(
        name=watcher.names[layer],
        kind=type(layer).__name__,
        macs=weight.numel() * calls.positions // batch,
        weight_count=weight.numel(),
        activation_count=calls.inputs // batch,
        output_count=calls.outputs // batch,
        calls=calls.calls,
        batchnorm=follower,
        is_input=calls.is_input,
    )
