"""One watched forward of a float model: what its layers run on, and what computes outside them.

No graph is captured. Module hooks see the layers; a ``TorchFunctionMode`` sees every functional call, so that a
residual add inside somebody's ``forward`` is found as surely as a pooling module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from nipq.errors import NotQuantizableError
from nipq.nn.attention import FUNCTION
from nipq.nn.kinds import is_supported, is_table, weight_uses
from nipq.nn.layers import LayerSpec
from nipq.nn.relu import cap_of, reads_in_sequence
from nipq.prepare.attention_trace import Attention, AttentionCalls
from nipq.prepare.float_pieces import BETWEEN_ACTIVATIONS, REASONS, FloatPiece, operation_of

#: What a model is called with: one tensor, several positional ones, or keywords.
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """What one forward did.

    Attributes:
        layers: facts of every supported layer that ran, in order of first execution.
        float_pieces: what computes outside them.
        unused: full names of supported layers that did not run.
        shared: names of the layers that read the same tensor, by the name of each of them.
        attention: modules that call torch's function for attention.
    """

    layers: tuple[LayerSpec, ...]
    float_pieces: tuple[FloatPiece, ...]
    unused: tuple[str, ...]
    shared: dict[str, tuple[str, ...]]
    attention: tuple[Attention, ...] = ()

    def ordered(self, *, products: bool) -> list[LayerSpec]:
        """Facts of what can be quantized, in order of first execution.

        Args:
            products: whether the products inside attention are among it.
        """
        found = list(self.layers)
        for attention in reversed(self.attention if products else ()):
            found[attention.place : attention.place] = [attention.scores, attention.mix]
        return found


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    """Call a model with example inputs in any of the accepted forms."""
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in mappings, tuples and lists, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


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


class _Watcher(TorchFunctionMode):
    """Hooks and function mode of one traced forward."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.layers: dict[nn.Module, _LayerCalls] = {}
        self.pieces: Counter[tuple[str, str]] = Counter()
        #: Who reads a tensor, by the tensor's id: names of innermost modules.
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
        self.attention: dict[str, AttentionCalls] = {}
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
        operation = operation_of(func)
        # What a layer computes inside is its own affair, except attention, which its quantizers would not see.
        if inner is not None and is_supported(inner) and operation != FUNCTION:
            return self._made(results, None, result)
        if operation == FUNCTION:
            within = [self.names[module] for module in self.stack[:-1]]
            self.attention.setdefault(where, AttentionCalls(len(self.layers))).add(args, kwargs or {}, within)
        if operation in REASONS and (len(operands) > 1 or operation not in BETWEEN_ACTIVATIONS):
            self.pieces[where, operation] += 1
        origins = {self.origin.get(id(tensor)) for tensor in operands}
        if None in origins or operation.startswith("embedding"):
            return self._made(results, None, result)
        return self._made(results, "input" if "input" in origins else "constant", result)

    def _made(self, results: list[Tensor], origin: Literal["input", "constant"] | None, result: object) -> Any:  # noqa: ANN401
        for tensor in results:
            if origin is None:
                self.origin.pop(id(tensor), None)  # an operation in place may have changed what it was
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
        """Name of the batch norm that alone reads what the layer makes, and reads nothing else."""
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
        """Name of the ReLU whose result the layer alone reads, and reads nothing else."""
        calls, name = self.layers[layer], self.names[layer]
        relu = self.relu_outputs.get(id(calls.input))
        if relu is None or calls.calls != 1 or self.relu_calls[relu] != 1:
            return None
        readers = self.readers[id(calls.input)] - {relu}  # in place, it reads what it makes
        return relu if readers == {name} and reads_in_sequence(model, relu, name) else None


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
    tensors = list(tensors_in(example_inputs))
    if not tensors or tensors[0].ndim == 0:
        raise NotQuantizableError(
            "trace: expected example inputs with a batch axis, found none. "
            "Pass a batch such as torch.zeros(1, 3, 224, 224)."
        )
    watcher = _Watcher(model, example_inputs)
    modes = {module: module.training for module in model.modules()}
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watcher.leave, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad(), watcher:
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
        for module, training in modes.items():
            module.training = training
    for tensor in tensors_in(output):
        watcher.readers.setdefault(id(tensor), set()).add("")  # whoever called the model
    multiplying = {id(layer.weight): name for layer, name in watcher.multiplying()}
    layers = tuple(_spec(model, layer, watcher, tensors[0].shape[0], multiplying) for layer in watcher.layers)
    folded = {spec.batchnorm for spec in layers}
    pieces = tuple(
        FloatPiece(name, operation, REASONS[operation], count)
        for (name, operation), count in watcher.pieces.items()
        if name not in folded
    )
    unused = tuple(
        name for module, name in watcher.names.items() if is_supported(module) and module not in watcher.layers
    )
    shared = {name: tuple(names) for names in watcher.layers_on.values() for name in names if len(names) > 1}
    attention = tuple(calls.found(name, tensors[0].shape[0]) for name, calls in watcher.attention.items())
    return Trace(layers, pieces, unused, shared, attention)


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
