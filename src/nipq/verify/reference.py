"""Rungs E1 and E3: layer by layer in whole codes.

For E1 the trained model runs in phase ``"round"`` and the input of every layer is kept. The deployed model then runs
with each layer's input *replaced* by the kept one, so that a layer answers for itself only. What had arrived there is
looked at first: its codes show all that happened since the layers before, be it a folded batch norm, an activation or a
sum. A product inside attention is a layer with two inputs.

What the trained model does on the data: everything that others are held against, piece by piece.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nipq.config import Phase
from nipq.export.modules import DeployedLayer, DeployedOperand, deployed_layers, deployed_products
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.batches import inputs_of, to_device
from nipq.prepare.layer_table import LayerRow, place_of, quantizers_at, set_phase_
from nipq.prepare.trace import ExampleInputs, call_model
from nipq.verify.metrics import Evidence, labels_of, logits_of, samples_in

#: What a deployed layer or product reads: place -> what makes whole codes of it, None where it stays float.
Reads = dict[str, DeployedLayer | DeployedOperand | None]


@dataclass
class Calls:
    """What went into each layer or product and came out, call by call.

    Attributes:
        inputs: by place, before quantization.
        codes: by place, the whole codes of those inputs; nothing for layers whose input stays float.
        outputs: by layer or product, after the batch norm that is folded into it.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    codes: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


@contextmanager
def recording(rows: dict[str, LayerRow]) -> Iterator[Calls]:
    """Keep what happens in the layers and products of a trained model while the context lasts.

    Args:
        rows: layers and products by name.

    Yields:
        The calls, filled as the model runs.
    """
    calls = Calls()
    handles = []
    for name, row in rows.items():
        read: dict[str, nn.Module] = {**quantizers_at(name, row)} or {name: row.layer}
        for place, module in read.items():
            handles.append(module.register_forward_pre_hook(_keep_first(calls.inputs[place]), with_kwargs=True))
        batchnorm = None if row.input is None else row.batchnorm
        handles.append((batchnorm or row.layer).register_forward_hook(_keep_output(calls.outputs[name])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    for place, quantizer in _quantizers(rows).items():
        calls.codes[place] = [quantizer.codes(x.float()) for x in calls.inputs[place]]


def run_forced(
    deployed: nn.Module, trained: Calls, evidence: dict[str, Evidence], run: Callable[[nn.Module], Any]
) -> None:
    """Run the deployed model with the trained inputs in all its layers and products, and note what differs (E1).

    Args:
        deployed: the deployed model.
        trained: calls of the trained model in phase ``"round"``.
        evidence: by place, layer and product, added to.
        run: calls a model on the batch.
    """
    read: dict[str, int] = defaultdict(int)
    written: dict[str, int] = defaultdict(int)
    handles = []

    def kept(place: str, quantizer: DeployedLayer | DeployedOperand | None, arrived: Tensor) -> Tensor:
        """The trained input, or what arrived if there is none for this call."""
        call, seen = read[place], evidence[place]
        read[place] += 1
        if call >= len(trained.inputs[place]) or trained.inputs[place][call].shape != arrived.shape:
            seen.calls_differ = True
            return arrived
        given = trained.inputs[place][call].to(arrived.device)
        if quantizer is not None:
            seen.levels = quantizer.code_high - quantizer.code_low
            codes = trained.codes[place][call].to(arrived.device)
            seen.add_codes(codes, quantizer.codes(given), quantizer.codes(arrived))
        return given

    def before(reads: Reads, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        arrived = args[: len(reads)] or (first_tensor(args, kwargs),)
        given = [kept(place, quantizer, x) for (place, quantizer), x in zip(reads.items(), arrived, strict=True)]
        if args:
            return (*given, *args[len(reads) :]), kwargs
        return args, {key: given[0] if value is arrived[0] else value for key, value in kwargs.items()}

    def after(name: str, output: Tensor) -> None:
        call, seen = written[name], evidence[name]
        written[name] += 1
        if call >= len(trained.outputs[name]) or trained.outputs[name][call].shape != output.shape:
            seen.calls_differ = True
            return
        seen.add_output(trained.outputs[name][call].to(output.device), output)

    for name, (module, reads) in _readers(deployed).items():
        for place in (*reads, name):
            evidence.setdefault(place, Evidence())
        handles.append(module.register_forward_pre_hook(_reading(before, reads), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _module, _args, output, name=name: after(name, output)))
    try:
        run(deployed)
    finally:
        for handle in handles:
            handle.remove()
    for place, expected in trained.inputs.items():
        evidence.setdefault(place, Evidence()).calls_differ |= read[place] != len(expected)


@contextmanager
def recording_integers(rows: Mapping[str, LayerRow]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what the input quantizers return while the context lasts; in phase ``"int"`` whole codes.

    Args:
        rows: layers and products by name.

    Yields:
        Codes by place, call by call.
    """
    codes: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for place, quantizer in _quantizers(rows).items():
            kept = codes[place] = []
            handle = quantizer.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
            stack.callback(handle.remove)
        yield codes


@contextmanager
def recording_codes(deployed: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes that go into each deployed layer and product while the context lasts.

    Args:
        deployed: the deployed model.

    Yields:
        Codes by place, call by call.
    """
    codes: dict[str, list[Tensor]] = {}
    handles = []

    def keep(reads: Reads, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived = args[: len(reads)] or (first_tensor(args, kwargs),)
        for (place, quantizer), x in zip(reads.items(), arrived, strict=True):
            if quantizer is not None:
                codes[place].append(quantizer.codes(x))

    for module, reads in _readers(deployed).values():
        codes |= {place: [] for place, quantizer in reads.items() if quantizer is not None}
        handles.append(module.register_forward_pre_hook(_reading(keep, reads), with_kwargs=True))
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def compare_codes(
    trained: dict[str, list[Tensor]], deployed: dict[str, list[Tensor]], evidence: dict[str, Evidence]
) -> None:
    """Note every code that differs between two runs (E3).

    Args:
        trained: codes by place of the trained model in phase ``"int"``.
        deployed: codes by place of the deployed model.
        evidence: by place, added to.
    """
    for name in {**trained, **deployed}:
        ours, theirs = trained.get(name, []), deployed.get(name, [])
        seen = evidence.setdefault(name, Evidence())
        if [codes.shape for codes in ours] != [codes.shape for codes in theirs]:
            seen.calls_differ = True
            continue
        for a, b in zip(ours, theirs, strict=True):
            seen.exact_codes += int((a != b.to(a.device)).sum())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found


def _quantizers(rows: Mapping[str, LayerRow]) -> dict[str, InputQuantizer]:
    return {place: found for name, row in rows.items() for place, found in quantizers_at(name, row).items()}


def _readers(deployed: nn.Module) -> dict[str, tuple[nn.Module, Reads]]:
    """Layers and products, and what each reads."""
    found: dict[str, tuple[nn.Module, Reads]] = {}
    for name, layer in deployed_layers(deployed).items():
        found[name] = layer, {name: layer if isinstance(layer, DeployedLayer) else None}
    for name, product in deployed_products(deployed).items():
        found[name] = product, {place_of(name, part): operand for part, operand in product.operands().items()}
    return found


def _reading(hook: Callable[..., Any], reads: Reads) -> Callable[..., Any]:
    return lambda _module, args, kwargs: hook(reads, args, kwargs)


def _keep_first(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(first_tensor(args, kwargs).detach().clone())  # a later layer may overwrite it in place

    return hook


def _keep_output(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output.detach().clone())

    return hook


#: Samples that go through the models at once: every layer's input is kept meanwhile.
AT_ONCE = 32
#: Samples on which the trained model's own noise is measured, one by one.
NOISE_SAMPLES = 64


@dataclass(frozen=True)
class Observation:
    """The trained model on one piece of a batch.

    Attributes:
        inputs: the piece.
        labels: right answers, or None.
        calls: what went into each layer and came out, phase ``"round"``.
        logits: what the model said, phase ``"round"``.
        other_kernels: the same with sums in another order.
        alone: the same sample by sample; None once enough samples were.
        codes: input codes by layer and call, phase ``"int"``.
        exact: what the model said in phase ``"int"``.
    """

    inputs: ExampleInputs
    labels: Tensor | None
    calls: Calls
    logits: Tensor
    other_kernels: Tensor
    alone: Tensor | None
    codes: dict[str, list[Tensor]]
    exact: Tensor


def observations(model: nn.Module, rows: dict[str, LayerRow], loader: Iterable[Any]) -> Iterator[Observation]:
    """Run the trained model on all that a loader yields; its phase is changed.

    Args:
        model: prepared, bits frozen, in evaluation mode.
        rows: its layers by name.
        loader: batches.

    Yields:
        One observation for each piece of a batch.
    """
    noise_samples = 0
    for batch in loader:
        inputs, labels = inputs_of(batch), labels_of(batch)
        count = samples_in(inputs)
        for start in range(0, count, AT_ONCE):
            piece = _cut(inputs, count, start, min(start + AT_ONCE, count))
            set_phase_(model, Phase.ROUND)
            with recording(rows) as calls:
                logits = logits_of(run_model(model, piece))
            # Flips are rare, so the trained model's own are counted on every sample, not on a few.
            with other_kernels():
                other = logits_of(run_model(model, piece))
            alone = None
            if noise_samples < NOISE_SAMPLES:
                noise_samples += len(logits)
                singles = [_cut(piece, samples_in(piece), i, i + 1) for i in range(samples_in(piece))]
                alone = torch.cat([logits_of(run_model(model, one)) for one in singles])
            set_phase_(model, Phase.INT)
            with recording_integers(rows) as codes:
                exact = logits_of(run_model(model, piece))
            right = None if labels is None else labels[start : start + AT_ONCE]
            yield Observation(piece, right, calls, logits, other, alone, codes, exact)


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    """Call a model on inputs moved to where it is; a model without tensors is on the CPU.

    Args:
        model: any model.
        inputs: what it is called with.
    """
    tensor = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    return call_model(model, to_device(inputs, tensor.device))


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


def _cut(inputs: ExampleInputs, count: int, start: int, end: int) -> ExampleInputs:
    """Samples ``start`` to ``end`` of a batch of ``count``."""

    def cut(value: Any) -> Any:  # noqa: ANN401  (tensors among a model's arguments)
        return value[start:end] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    if isinstance(inputs, Tensor):
        return inputs[start:end]
    if isinstance(inputs, Mapping):
        return {key: cut(value) for key, value in inputs.items()}
    return [cut(value) for value in inputs]
