"""What the trained model does on the data: everything that others are held against, piece by piece."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nipq.phases import Phase
from nipq.prepare.control import set_phase_
from nipq.prepare.layer_table import LayerRow
from nipq.prepare.trace import ExampleInputs, call_model
from nipq.qat.calibrate import inputs_of, to_device
from nipq.verify.distance import labels_of, logits_of, samples_in
from nipq.verify.layers import Calls, recording, recording_integers

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
