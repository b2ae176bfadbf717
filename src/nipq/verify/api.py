"""``nipq.verify``: check that deployed models and files are the trained model, from single numbers up to the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nipq.config import Phase
from nipq.distributed import inner
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.nn.layers import check_module, float_weight
from nipq.prepare.batches import BatchReader, Inputs, evaluating
from nipq.prepare.convert import convert
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import layer_table, phase_of, quantization_points, quantizers, set_phase_, weight_table
from nipq.verify.archives import ArraysCandidate, ProgramCandidate
from nipq.verify.candidate import Candidate, UnreadableCandidate
from nipq.verify.onnx import OnnxCandidate
from nipq.verify.reference import reference_runs, same_kernels
from nipq.verify.result import VerifyResult
from nipq.verify.torch_module import module_candidate, packed_candidate

#: Artifacts that can be compared with the trained model: modules, and files by path.
Artifact = nn.Module | str | Path

#: Candidates of exported files, by the end of the file's name.
EXPORTED: dict[str, Callable[[Path, nn.Module, Iterable[str], ExampleInputs], Candidate]] = {
    ".onnx": OnnxCandidate,
    ".npz": ArraysCandidate,
    ".pt2": ProgramCandidate,
}

#: Score of a model on the task: ``metric(model, loader)``.
Metric = Callable[[nn.Module, Iterable[Any]], float]


@torch.no_grad()
def verify(
    model: nn.Module,
    *artifacts: Artifact | Iterable[Any],
    loader: Iterable[Any] | None = None,
    file: str | Path | None = None,
    metric: Metric | None = None,
    inputs: Inputs | None = None,
) -> VerifyResult:
    """Check deployed models and files against the trained model, from single numbers up to the task.

    Each artifact is checked at up to four levels:

    ==  ==========================================================================================================
    E0  static: integers, scales, zero points, limits and float parts are bit-equal; so is the file read back, and it
        has the promised size
    E1  layers: every layer gets the trained model's input. Its codes are the same, and its output is within 1e-5 of its
        largest value, all that the model returns within 1e-3. The reference, phase ``"round"``, shares no forward with
        the deployed layers. In half precision 32 roundings are allowed. Of the codes at the next quantizer, 1e-4 (one
        at least, more above 8 bits) may flip by one level, as float sums run in another order. A product inside
        attention is a layer with two inputs
    E2  noise: the mean distance of the logits is at most 3 times the trained model's distance from itself when batch
        size or kernels change, or the effect of flipped codes at 3 % of the largest logit each: as many as E1
        counted and chance adds, three at least, one in twenty samples at most. Top-1 decisions differ at a rate of at
        most 0.5 %, or 3 times the trained model's from its own, plus the count that chance adds in 98 % of cases
    E3  exact: equal to the trained model in phase ``"int"``, codes and outputs, without any tolerance. Both sides run
        the same arithmetic: that it is right is E1's to prove
    ==  ==========================================================================================================

    Each kind of artifact is checked at the levels that it can reach: a file of floats, such as ONNX, has no E3. The
    documentation of ``verify`` lists them.

    Args:
        model: prepared and trained, bits frozen; its phase and modes are restored.
        *artifacts: models that ``nipq.convert`` or ``nipq.load`` returned or a runtime compiled, or files:
            ``.nipq.safetensors``, ``.onnx``, ``.qonnx.onnx``, ``.npz``, ``.pt2``. The last one may be the loader.
        loader: batches as for ``nipq.calibrate_``, at least one; a few hundred samples of real data do. All that the
            loader yields is used.
        file: the packed file of the one deployed module among the artifacts, to be checked with it.
        metric: the task's score, called as ``metric(model, loader)`` on every model. Without one, top-1 accuracy in per
            cent when the batches hold labels, see :class:`nipq.prepare.batches.BatchReader`.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        A :class:`VerifyResult`, true when every check of every artifact passed. A file that cannot be read fails E0.

    Raises:
        OrderError: if the model is not prepared, or its bits are not frozen.
        ConfigError: if there is no artifact or no batch, or an artifact is nothing that was deployed.
        MissingDependencyError: if a package that reads a file is not installed.
    """
    check_module(model, "verify")
    model = inner(model)
    given, batches = _sorted_out(artifacts, loader)
    given = [inner(artifact) if isinstance(artifact, nn.Module) else artifact for artifact in given]
    _check_arguments(model, given, file)
    names = {module: name for name, module in model.named_modules()}
    rows = {names[row.layer]: row for row in layer_table(model)}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model, *(artifact for artifact in given if isinstance(artifact, nn.Module))))
        stack.callback(set_phase_, model, phase_of(model))
        reader = BatchReader(model, inputs, "verify")
        for row, weight in weight_table(model):
            weight.follow_(float_weight(row.layer))  # which may have moved since the last forward
        example = reader.inputs(*reversed(next(reader.read(batches))))
        packed = None if file is None else Path(file)
        points = quantization_points(rows)
        candidates = [_candidate(artifact, model, points, example, packed) for artifact in given]
        checks = {candidate: [candidate.static_check()] for candidate in candidates}
        stack.enter_context(same_kernels(model))
        for reference in reference_runs(model, rows, batches, reader):
            for candidate in candidates:
                candidate.compare(reference)
        scores = _scores(model, candidates, batches, metric)
        for candidate in candidates:
            checks[candidate] += candidate.checks(scores[candidate])
    named = len(candidates) > 1  # a module that is alone needs no name
    return VerifyResult(
        tuple(
            replace(check, artifact=candidate.name if candidate.is_file or named else "")
            for candidate in candidates
            for check in checks[candidate]
        )
    )


def _candidate(
    artifact: Artifact, model: nn.Module, layers: Iterable[str], example: ExampleInputs, file: Path | None
) -> Candidate:
    """The candidate for an artifact; one that fails E0 if its file cannot be read."""
    if isinstance(artifact, nn.Module):
        return module_candidate(artifact, layers, model, file)
    path = Path(artifact)
    try:
        if path.name.endswith(".safetensors"):
            return packed_candidate(path, layers, model)
        kind = next((kind for ending, kind in EXPORTED.items() if path.name.endswith(ending)), None)
        if kind is not None:
            return kind(path, convert(model).cpu(), layers, example)
    except FileFormatError as error:
        return UnreadableCandidate(path.name, str(error))
    raise ConfigError(
        f"verify: expected a file ending in .nipq.safetensors, {', '.join(EXPORTED)}; found {path.name}. "
        "Rename it, or give another one."
    )


def _sorted_out(
    artifacts: Sequence[Artifact | Iterable[Any]], loader: Iterable[Any] | None
) -> tuple[list[Artifact], Iterable[Any]]:
    """Artifacts and batches; the batches of a loader that can be read only once are kept."""
    given = list(artifacts)
    if loader is None and artifacts:
        last = artifacts[-1]
        if not isinstance(last, (nn.Module, str, Path)):
            loader, given = last, given[:-1]
    found = [artifact for artifact in given if isinstance(artifact, (nn.Module, str, Path))]
    if loader is None or not found or len(found) < len(given):
        raise ConfigError(
            f"verify: expected deployed models or files and one loader, found {len(found)} of {len(given)} and "
            f"{'no' if loader is None else 'one'} loader. Call nipq.verify(model, deployed, loader)."
        )
    return found, list(loader) if isinstance(loader, Iterator) else loader


def _check_arguments(model: nn.Module, given: Sequence[Artifact], file: str | Path | None) -> None:
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a frozen bit-width, found one that is still learned. "
                "Call nipq.freeze_bits_(model, budget) and nipq.convert(model) before nipq.verify."
            )
    modules = sum(isinstance(artifact, nn.Module) for artifact in given)
    if file is not None and modules != 1:
        raise ConfigError(
            f"verify: expected one deployed module with file={str(file)!r}, found {modules}. "
            "Give the file as one of the artifacts."
        )


def _scores(
    model: nn.Module, candidates: Sequence[Candidate], loader: Iterable[Any], metric: Metric | None
) -> dict[Candidate, dict[str, float]]:
    """Score on the task of the trained model, and of each candidate that can be run."""
    if metric is None:
        return {candidate: candidate.output.accuracies() for candidate in candidates}
    set_phase_(model, Phase.ROUND)
    trained = metric(model, loader)
    scores = {
        s: {"metric_trained": trained, "metric_deployed": metric(s.module, loader)} for s in candidates if s.module
    }
    return {candidate: scores.get(candidate, {}) for candidate in candidates}
