"""The ladder: is the deployed model the one that was trained?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq.calibrate import inputs_of, to_device
from nipq.control import phase_of, set_phase_
from nipq.deploy.file import file_bytes
from nipq.deploy.load import load
from nipq.deploy.modules import deployed_layers
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.layer_table import LayerRow, layer_table, quantizers
from nipq.nn.quantizer import InputQuantizer
from nipq.phases import Phase
from nipq.prepare import restore_
from nipq.trace import ExampleInputs, call_model
from nipq.verify.distance import Distance, labels_of, logits_of, samples_in
from nipq.verify.layers import Evidence, compare_codes, recording, recording_codes, run_forced
from nipq.verify.result import Rung, VerifyResult
from nipq.verify.static import file_differences, trained_differences

#: A task's own score: ``metric(model, loader)``.
Metric = Callable[[nn.Module, Iterable[Any]], float]

#: Samples that go through the models at once: every layer's input is kept meanwhile.
AT_ONCE = 32
#: Samples on which the trained model's own noise is measured, one by one.
NOISE_SAMPLES = 64


@torch.no_grad()
def verify(
    model: nn.Module,
    deployed: nn.Module,
    loader: Iterable[Any],
    *,
    file: str | Path | None = None,
    metric: Metric | None = None,
) -> VerifyResult:
    """Compare a trained model with the deployed one, from single numbers to the task.

    ==  ==========================================================================================================
    E0  static: integers, scales, zero points, limits and what stays float are bit-equal; so is the file read back,
        and its size is the promised one
    E1  layers: on the same input the same codes, and an output within 1e-5 of its largest value; what the trained
        outputs become on the way to the next layer has the same codes there, but for 1e-4 of them (one at least)
        that may flip by one level, as float sums run in another order
    E2  noise: the mean distance of the logits is at most 3 times the trained model's distance to itself when the batch
        size or the kernels change, or what three flipped codes in three samples make, 3 % of the largest logit each;
        top-1 agrees on 99.5 % (on all but one of few), or disagrees at most 3 times as often as the trained model does
        with itself
    E3  exact: equal to the trained model in phase ``"int"``, codes and outputs, without any tolerance
    ==  ==========================================================================================================

    Args:
        model: prepared and trained, bits frozen; its phase and modes are restored.
        deployed: what ``nipq.convert`` or ``nipq.load`` returned.
        loader: batches as for ``nipq.calibrate_``, at least one; a few hundred samples of real data do. All that the
            loader yields is used.
        file: the packed file of the deployed model, to be checked with it.
        metric: the task's score, called as ``metric(model, loader)`` on both models. Without one, top-1 accuracy in per
            cent when the batches hold labels (second item of a tuple, or ``"labels"`` of a dict).

    Returns:
        A :class:`VerifyResult`, true when every rung holds.

    Raises:
        OrderError: if the model is not prepared, or its bits are not frozen.
        ConfigError: if ``deployed`` holds no deployed layer, or the loader is empty.
    """
    _check(model, deployed)
    if isinstance(loader, Iterator):
        loader = list(loader)  # read more than once
    names = {module: name for name, module in model.named_modules()}
    rows = {names[row.layer]: row for row in layer_table(model)}
    with _evaluating(model, deployed):
        static = _static_rung(model, deployed, None if file is None else Path(file))
        evidence = {name: Evidence() for name in rows}
        distance = Distance()
        for batch in loader:
            _compare(model, deployed, rows, batch, evidence, distance)
        if distance.samples == 0:
            raise ConfigError("verify: expected at least one batch, found an empty loader. Give some real data.")
        scores = distance.scores()
        if metric is not None:
            set_phase_(model, Phase.ROUND)
            scores = {"metric_trained": metric(model, loader), "metric_deployed": metric(deployed, loader)}
    return VerifyResult((static, _layer_rung(evidence), distance.rung(scores), _exact_rung(evidence, distance)))


def _check(model: nn.Module, deployed: nn.Module) -> None:
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a frozen bit-width, found one that is still learned. "
                "Call nipq.freeze_bits_(model, budget) and nipq.convert(model) before nipq.verify."
            )
    if not deployed_layers(deployed):
        raise ConfigError(
            f"verify: expected a deployed {type(model).__name__}, found a {type(deployed).__name__} without deployed "
            "layers. Give what nipq.convert or nipq.load returned."
        )


@contextmanager
def _evaluating(model: nn.Module, deployed: nn.Module) -> Iterator[None]:
    """Both models in evaluation mode; modes and phase are restored."""
    modes = {module: module.training for part in (model, deployed) for module in part.modules()}
    phase = phase_of(model)
    try:
        model.eval()
        deployed.eval()
        yield
    finally:
        set_phase_(model, phase)
        for module, training in modes.items():
            module.training = training


def _static_rung(model: nn.Module, deployed: nn.Module, file: Path | None) -> Rung:
    found = list(trained_differences(model, deployed))
    numbers: dict[str, Any] = {"layers": len(deployed_layers(deployed))}
    if file is not None:
        numbers["bytes_promised"] = file_bytes(deployed)
        try:
            loaded = load(file, restore_(copy.deepcopy(model)))
            numbers["bytes_found"] = file.stat().st_size
            if numbers["bytes_found"] != numbers["bytes_promised"]:
                found.append(f"{file.name}: {numbers['bytes_found']:,} bytes, promised {numbers['bytes_promised']:,}")
            found += file_differences(deployed, loaded)
        except FileFormatError as error:
            found.append(str(error))
    numbers["differences"] = len(found)
    claim = "integers, scales, zero points, limits" + ("; the file" if file is not None else "")
    return Rung("E0 static", claim, not found, numbers, found[0] if found else None)


def _compare(
    model: nn.Module,
    deployed: nn.Module,
    rows: dict[str, LayerRow],
    batch: Any,  # noqa: ANN401  (whatever a loader yields)
    evidence: dict[str, Evidence],
    distance: Distance,
) -> None:
    """Add one batch to the evidence of E1, E2 and E3."""
    inputs, labels = inputs_of(batch), labels_of(batch)
    count = samples_in(inputs)
    for start in range(0, count, AT_ONCE):
        piece = _cut(inputs, count, start, min(start + AT_ONCE, count))
        set_phase_(model, Phase.ROUND)
        with recording(rows) as calls:
            trained = logits_of(_run(model, piece))
        run_forced(deployed, calls, evidence, partial(_run, inputs=piece))
        # Flips are rare, so the trained model's own are counted on every sample, not on a few.
        with _other_kernels():
            distance.add_kernel_noise(trained, logits_of(_run(model, piece)))
        if distance.noise_samples < NOISE_SAMPLES:
            alone = [_cut(piece, samples_in(piece), i, i + 1) for i in range(samples_in(piece))]
            distance.add_batch_noise(trained, torch.cat([logits_of(_run(model, one)) for one in alone]))
        with recording_codes(deployed) as codes:
            found = logits_of(_run(deployed, piece))
        set_phase_(model, Phase.INT)
        with _recording_integers(rows) as expected:
            exact = logits_of(_run(model, piece))
        compare_codes(expected, codes, evidence)
        distance.add(trained, found, exact, None if labels is None else labels[start : start + AT_ONCE])


def _layer_rung(evidence: Mapping[str, Evidence]) -> Rung:
    faults = {name: fault for name, seen in evidence.items() if (fault := seen.layer_fault())}
    numbers = {
        "codes": sum(seen.codes for seen in evidence.values()),
        "wrong": sum(seen.wrong for seen in evidence.values()),
        "flips": sum(seen.flips for seen in evidence.values()),
        "worst_output": max((seen.error / seen.largest for seen in evidence.values() if seen.largest), default=0.0),
        "layers_at_fault": len(faults),
    }
    return Rung("E1 layers", "each layer on the trained inputs", not faults, numbers, _first(faults))


def _exact_rung(evidence: Mapping[str, Evidence], distance: Distance) -> Rung:
    faults = {name: fault for name, seen in evidence.items() if (fault := seen.exact_fault())}
    numbers = {
        "codes_apart": sum(seen.exact_codes for seen in evidence.values()),
        "output_difference": distance.exact,
    }
    first = _first(faults) or (None if distance.exact == 0 else "the outputs differ though all codes agree")
    return Rung("E3 exact", "bit for bit in whole numbers", first is None, numbers, first)


def _first(faults: Mapping[str, str]) -> str | None:
    return next((f"{name}: {fault}" for name, fault in faults.items()), None)


@contextmanager
def _recording_integers(rows: Mapping[str, LayerRow]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what the input quantizers return; in phase ``int`` whole codes."""
    codes: dict[str, list[Tensor]] = {name: [] for name, row in rows.items() if row.input is not None}
    with ExitStack() as stack:
        for name, kept in codes.items():
            quantizer = rows[name].input
            assert isinstance(quantizer, InputQuantizer)
            handle = quantizer.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
            stack.callback(handle.remove)
        yield codes


@contextmanager
def _other_kernels() -> Iterator[None]:
    """Run on torch's plain kernels instead of oneDNN's or cuDNN's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some builds warn about settings that they do not have
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


def _run(model: nn.Module, inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever the model returns)
    tensor = next(iter([*model.parameters(), *model.buffers()]))
    return call_model(model, to_device(inputs, tensor.device))


def _cut(inputs: ExampleInputs, count: int, start: int, end: int) -> ExampleInputs:
    """Samples ``start`` to ``end`` of a batch of ``count``."""

    def cut(value: Any) -> Any:  # noqa: ANN401  (tensors among a model's arguments)
        return value[start:end] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    if isinstance(inputs, Tensor):
        return inputs[start:end]
    if isinstance(inputs, Mapping):
        return {key: cut(value) for key, value in inputs.items()}
    return [cut(value) for value in inputs]
