"""Runs of the trained model that candidates are compared with, and the recording of layers' inputs and outputs.

For E1 the trained model runs in phase ``"round"`` and the input of every layer is kept. The deployed model then runs
with each layer's input *replaced* by the kept one (teacher forcing), so that a fault shows in the layer that makes it.
The tensor that had arrived there is compared first: its codes show all that happened since the layers before, be it a
folded batch norm, an activation or a sum. A product inside attention is a layer with two inputs.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nipq.config import Phase
from nipq.errors import ConfigError
from nipq.functional.uniform import widened
from nipq.nn.deployed import DeployedKeptLayer, DeployedLayer, DeployedOperand, deployed_layers, deployed_products
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.batches import BatchReader, call_model, device_of, to_device
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import LayerRow, operand_point, quantizers_at, set_phase_
from nipq.verify.metrics import LayerComparison, logits_of

#: Samples that go through the models at once: every layer's input is kept meanwhile.
AT_ONCE = 32
#: Samples on which the trained model's own noise is measured, one by one.
NOISE_SAMPLES = 64


@dataclass
class Calls:
    """Inputs and outputs of each layer or product, call by call.

    Attributes:
        inputs: by quantization point, before quantization.
        codes: by quantization point, the whole codes of those inputs; nothing for layers whose input stays float.
        outputs: by layer or product, after the batch norm that is folded into it.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    codes: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class ReferenceRun:
    """Runs of the trained model on one piece of a batch.

    Attributes:
        inputs: the piece.
        labels: right answers, or None.
        calls: inputs and outputs of each layer, phase ``"round"``.
        logits: outputs of the model, phase ``"round"``.
        other_kernels: the same with sums in another order.
        alone: the same sample by sample; None once enough samples were.
        codes: input codes by quantization point and call, phase ``"int"``.
        exact: outputs of the model in phase ``"int"``.
    """

    inputs: ExampleInputs
    labels: Tensor | None
    calls: Calls
    logits: Tensor
    other_kernels: Tensor
    alone: Tensor | None
    codes: dict[str, list[Tensor]]
    exact: Tensor


def reference_runs(
    model: nn.Module, rows: dict[str, LayerRow], loader: Iterable[Any], reader: BatchReader
) -> Iterator[ReferenceRun]:
    """Run the trained model on all that a loader yields; its phase is changed.

    Args:
        model: prepared, bits frozen, in evaluation mode.
        rows: its layers by name.
        loader: batches.
        reader: finds the model's inputs and the labels in a batch.

    Yields:
        One run for each piece of a batch.
    """
    measured = 0
    for where, batch in reader.read(loader):
        inputs, labels = reader.inputs(batch, where), labels_of(batch, reader)
        count = reader.samples(inputs)
        for start in range(0, count, AT_ONCE):
            piece = reader.cut(inputs, start, min(start + AT_ONCE, count))
            set_phase_(model, Phase.ROUND)
            with _recording(rows) as calls:
                logits = logits_of(run_model(model, piece))
            # Flips are rare, so the trained model's own are counted on every sample, not on a few.
            with other_kernels():
                other = logits_of(run_model(model, piece))
            alone = None
            if measured < NOISE_SAMPLES:
                measured += len(logits)
                singles = [reader.cut(piece, i, i + 1) for i in range(reader.samples(piece))]
                alone = torch.cat([logits_of(run_model(model, one)) for one in singles])
            set_phase_(model, Phase.INT)
            with _recording_integers(rows) as codes:
                exact = logits_of(run_model(model, piece))
            right = None if labels is None else labels[start : start + AT_ONCE]
            yield ReferenceRun(piece, right, calls, logits, other, alone, codes, exact)


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    """Call a model on inputs moved to its device; a model without tensors is on the CPU."""
    return call_model(model, to_device(inputs, device_of(model)))


def labels_of(batch: Any, reader: BatchReader) -> Tensor | None:  # noqa: ANN401  (whatever a loader yields)
    """Whole-number labels of a batch: the first of its targets, None if there are none.

    Args:
        batch: what the loader yields.
        reader: finds the targets in it.
    """
    try:
        found = reader.targets(batch)
    except ConfigError:  # it has none
        return None
    found = found[0] if isinstance(found, tuple) and found else found
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


@contextmanager
def other_kernels() -> Iterator[None]:
    """Run on torch's plain kernels instead of oneDNN's or cuDNN's, and linear layers with sums in float64.

    Linear layers are not oneDNN's in every build of torch, and would then show no noise of their own. Their sums in
    float64, rounded once, differ from the usual ones by the whole rounding error of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some builds warn about settings that they do not have
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False), _InDouble():
            yield


class _InDouble(TorchFunctionMode):
    """Linear layers, and ``addmm`` of those that call it, in float64, rounded once."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func not in (linear, torch.addmm):
            return func(*args, **(kwargs or {}))
        wide = [value.double() if isinstance(value, Tensor) else value for value in args]
        named = {key: value.double() if isinstance(value, Tensor) else value for key, value in (kwargs or {}).items()}
        given = (*args, *(kwargs or {}).values())
        return func(*wide, **named).to(next(value.dtype for value in given if isinstance(value, Tensor)))


@contextmanager
def _recording(rows: Mapping[str, LayerRow]) -> Iterator[Calls]:
    """Keep inputs and outputs of the layers and products of a trained model while the context lasts."""
    calls = Calls()
    with ExitStack() as stack:
        for name, row in rows.items():
            read: dict[str, nn.Module] = {**quantizers_at(name, row)} or {name: row.layer}
            for point, module in read.items():
                hook = _keep_input(calls.inputs[point])
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            batchnorm = None if row.input is None else row.batchnorm
            hook = _keep_output(calls.outputs[name])
            stack.callback((batchnorm or row.layer).register_forward_hook(hook).remove)
        yield calls
    for point, quantizer in _quantizers(rows).items():
        calls.codes[point] = [quantizer.codes(x.float()) for x in calls.inputs[point]]


def _keep_input(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(_first_tensor(args, kwargs).detach().clone())  # a later layer may overwrite it in place

    return hook


def _keep_output(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output.detach().clone())

    return hook


@contextmanager
def _recording_integers(rows: Mapping[str, LayerRow]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes of quantized inputs by quantization point while the context lasts."""
    codes: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for point, quantizer in _quantizers(rows).items():
            kept = codes[point] = []
            handle = quantizer.register_forward_pre_hook(_keep_codes(quantizer, kept))
            stack.callback(handle.remove)
        yield codes


def _keep_codes(quantizer: InputQuantizer, kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(quantizer.codes(widened(args[0])))

    return hook


def _quantizers(rows: Mapping[str, LayerRow]) -> dict[str, InputQuantizer]:
    return {point: found for name, row in rows.items() for point, found in quantizers_at(name, row).items()}


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found


#: Modules that make whole codes.
CodesOf = DeployedLayer | DeployedKeptLayer | DeployedOperand
#: Inputs of a deployed layer or product: quantization point -> the module that makes whole codes of it, None if float.
Reads = dict[str, CodesOf | None]


def _readers(deployed: nn.Module) -> dict[str, tuple[nn.Module, Reads]]:
    """Layers and products by name, and the inputs of each."""
    found: dict[str, tuple[nn.Module, Reads]] = {}
    for name, layer in deployed_layers(deployed).items():
        quantized = layer if isinstance(layer, (DeployedLayer, DeployedKeptLayer)) else None
        found[name] = layer, {name: None if quantized is None or quantized.input_step is None else quantized}
    for name, product in deployed_products(deployed).items():
        found[name] = product, {operand_point(name, part): operand for part, operand in product.operands().items()}
    return found


def run_teacher_forced(
    deployed: nn.Module, trained: Calls, layers: dict[str, LayerComparison], run: Callable[[nn.Module], Any]
) -> None:
    """Run the deployed model with the trained inputs in all its layers and products, and compare them (E1).

    Args:
        deployed: the deployed model.
        trained: calls of the trained model in phase ``"round"``.
        layers: comparisons by quantization point, layer and product; added to.
        run: calls a model on the batch.
    """
    read: dict[str, int] = defaultdict(int)
    written: dict[str, int] = defaultdict(int)

    def forced(point: str, quantizer: CodesOf | None, arrived: Tensor) -> Tensor:
        """The trained input, or what arrived if there is none for this call."""
        call, layer = read[point], layers[point]
        read[point] += 1
        if call >= len(trained.inputs[point]) or trained.inputs[point][call].shape != arrived.shape:
            layer.calls_differ = True
            return arrived
        given = trained.inputs[point][call].to(arrived.device)
        if quantizer is not None:
            layer.levels = quantizer.code_high - quantizer.code_low
            codes = trained.codes[point][call].to(arrived.device)
            layer.add_codes(codes, quantizer.codes(given), quantizer.codes(arrived))
        return given

    def before(reads: Reads) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
            arrived = args[: len(reads)] or (_first_tensor(args, kwargs),)
            given = [forced(point, quantizer, x) for (point, quantizer), x in zip(reads.items(), arrived, strict=True)]
            if args:
                return (*given, *args[len(reads) :]), kwargs
            return args, {key: given[0] if value is arrived[0] else value for key, value in kwargs.items()}

        return hook

    def after(name: str, output: Tensor) -> None:
        call, layer = written[name], layers[name]
        written[name] += 1
        if call >= len(trained.outputs[name]) or trained.outputs[name][call].shape != output.shape:
            layer.calls_differ = True
            return
        layer.add_output(trained.outputs[name][call].to(output.device), output)

    with ExitStack() as stack:
        for name, (module, reads) in _readers(deployed).items():
            for point in (*reads, name):
                layers.setdefault(point, LayerComparison())
            stack.callback(module.register_forward_pre_hook(before(reads), with_kwargs=True).remove)
            hook = module.register_forward_hook(lambda _module, _args, output, name=name: after(name, output))
            stack.callback(hook.remove)
        run(deployed)
    for point, expected in trained.inputs.items():
        layers.setdefault(point, LayerComparison()).calls_differ |= read[point] != len(expected)


@contextmanager
def recording_codes(deployed: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes that go into deployed layers and products while the context lasts, by quantization point."""
    codes: dict[str, list[Tensor]] = {}

    def keep(reads: Reads) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived = args[: len(reads)] or (_first_tensor(args, kwargs),)
            for (point, quantizer), x in zip(reads.items(), arrived, strict=True):
                if quantizer is not None:
                    codes[point].append(quantizer.codes(x))

        return hook

    with ExitStack() as stack:
        for module, reads in _readers(deployed).values():
            codes |= {point: [] for point, quantizer in reads.items() if quantizer is not None}
            stack.callback(module.register_forward_pre_hook(keep(reads), with_kwargs=True).remove)
        yield codes


def compare_codes(
    trained: dict[str, list[Tensor]], deployed: dict[str, list[Tensor]], layers: dict[str, LayerComparison]
) -> None:
    """Count the codes that differ between two runs (E3).

    Args:
        trained: codes by quantization point of the trained model in phase ``"int"``.
        deployed: codes by quantization point of the deployed model.
        layers: comparisons by quantization point; added to.
    """
    for name in {**trained, **deployed}:
        ours, theirs = trained.get(name, []), deployed.get(name, [])
        layer = layers.setdefault(name, LayerComparison())
        if [codes.shape for codes in ours] != [codes.shape for codes in theirs]:
            layer.calls_differ = True
            continue
        for a, b in zip(ours, theirs, strict=True):
            layer.exact_codes += int((a != b.to(a.device)).sum())
