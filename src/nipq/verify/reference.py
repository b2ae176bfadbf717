"""Runs of the trained model that candidates are compared with, in phases ``"round"`` and ``"int"``.

E1 is by :mod:`nipq.prepare.teacher_forcing`. The model's own noise is measured here, too: on other kernels, and sample
by sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nipq.config import Phase
from nipq.errors import ConfigError
from nipq.functional.uniform import widened
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer
from nipq.prepare.batches import BatchReader, call_model, device_of, to_device
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import LayerRow, set_phase_
from nipq.prepare.teacher_forcing import (
    Calls,
    LayerComparison,
    Reads,
    first_tensor,
    float_results,
    points_of,
    readers,
    recording,
)
from nipq.verify.metrics import logits_of, logits_place

#: Samples that go through the models at once: every layer's input is kept meanwhile.
AT_ONCE = 32
#: Samples on which the trained model's own noise is measured, one by one.
NOISE_SAMPLES = 64


@dataclass(frozen=True)
class ReferenceRun:
    """Runs of the trained model on one piece of a batch.

    Attributes:
        inputs: the piece.
        labels: right answers, or None.
        calls: inputs and outputs of each layer, phase ``"round"``.
        place: which of the floating tensors that the model returns are its logits.
        logits: these, phase ``"round"``.
        other_kernels: the same with sums in another order.
        alone: the same sample by sample; None once enough samples were.
        codes: input codes by quantization point and call, phase ``"int"``.
        exact: outputs of the model in phase ``"int"``.
    """

    inputs: ExampleInputs
    labels: Tensor | None
    calls: Calls
    place: int
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
            with recording(rows) as calls:
                output = run_model(model, piece)
            calls.results = [tensor.clone() for tensor in float_results(output)]
            place = logits_place(output)
            logits = logits_of(output, place)
            # Flips are rare, so the trained model's own are counted on every sample, not on a few.
            with other_kernels():
                other = logits_of(run_model(model, piece), place)
            other = other if other.shape == logits.shape else logits
            alone = None
            if measured < NOISE_SAMPLES:
                measured += len(logits)
                singles = [reader.cut(piece, i, i + 1) for i in range(reader.samples(piece))]
                parts = [logits_of(run_model(model, one), place) for one in singles]
                one_by_one = torch.cat(parts) if all(part.ndim for part in parts) else logits
                alone = one_by_one if one_by_one.shape == logits.shape else None  # sizes may depend on the data
            set_phase_(model, Phase.INT)
            with _recording_integers(rows) as codes:
                exact = logits_of(run_model(model, piece), place)
            right = None if labels is None else labels[start : start + AT_ONCE]
            yield ReferenceRun(piece, right, calls, place, logits, other, alone, codes, exact)


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
def same_kernels(model: nn.Module) -> Iterator[None]:
    """Let torch take the kernels for the trained model that it takes for the deployed one.

    Where torch folds batches for a matrix product depends on whether a weight requires gradients, though none are
    computed, and with it the last bit of what stayed float.

    Args:
        model: the trained model; quantizers keep their flags, as these say what a method learns.
    """
    own = {
        id(part) for module in model.modules() if isinstance(module, TensorQuantizer) for part in module.parameters()
    }
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


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
def _recording_integers(rows: Mapping[str, LayerRow]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes of quantized inputs by quantization point while the context lasts."""
    codes: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for point, quantizer in points_of(rows).items():
            kept = codes[point] = []
            handle = quantizer.register_forward_pre_hook(_keep_codes(quantizer, kept))
            stack.callback(handle.remove)
        yield codes


def _keep_codes(quantizer: InputQuantizer, kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(quantizer.codes(widened(args[0])))

    return hook


@contextmanager
def recording_codes(deployed: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes that go into deployed layers and products while the context lasts, by quantization point."""
    codes: dict[str, list[Tensor]] = {}

    def keep(reads: Reads) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived = args[: len(reads)] or (first_tensor(args, kwargs),)
            for (point, quantizer), x in zip(reads.items(), arrived, strict=True):
                if quantizer is not None:
                    codes[point].append(quantizer.codes(x))

        return hook

    with ExitStack() as stack:
        for module, reads in readers(deployed).values():
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
