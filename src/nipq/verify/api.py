"""From what the caller names to what can be compared.

The ladder: are these deployed models and files the one that was trained?
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nipq.config import Phase
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.export.convert import convert
from nipq.export.modules import deployed_layers
from nipq.export.packed_read import load
from nipq.export.runtimes import CompiledModel
from nipq.prepare.batches import inputs_of
from nipq.prepare.layer_table import layer_table, phase_of, places, quantizers, set_phase_
from nipq.prepare.prepare import restore_
from nipq.prepare.trace import ExampleInputs
from nipq.verify.arrays import ArraysSubject
from nipq.verify.candidate import Subject, Unreadable
from nipq.verify.onnx import OnnxSubject
from nipq.verify.program import ProgramSubject
from nipq.verify.reference import observations
from nipq.verify.result import Rung, VerifyResult
from nipq.verify.torch_module import CompiledSubject, DeployedSubject

#: What can be compared with the trained model.
Artifact = nn.Module | str | Path

#: Ends of the names of files that can be compared.
ENDINGS = (".nipq.safetensors", ".onnx", ".npz", ".pt2")


def subject_of(
    artifact: Artifact, model: nn.Module, layers: Iterable[str], example: ExampleInputs, file: Path | None
) -> Subject:
    """What stands for an artifact while it is compared.

    Args:
        artifact: a module or a file.
        model: the trained model.
        layers: full names of its layers, in the order of execution.
        example: one batch.
        file: the packed file of the module.

    Returns:
        The subject; one that fails if the file cannot be read.

    Raises:
        ConfigError: if the module holds no deployed layer, or the file's name ends in nothing that is known.
    """
    if not isinstance(artifact, nn.Module):
        return _file_subject(Path(artifact), model, layers, example)
    if isinstance(artifact, CompiledModel):
        return CompiledSubject(artifact, layers)
    if not deployed_layers(artifact):
        raise ConfigError(
            f"verify: expected a deployed {type(model).__name__}, found a {type(artifact).__name__} without deployed "
            "layers. Give what nipq.convert or nipq.load returned."
        )
    return DeployedSubject("deployed model", artifact, layers, model, file)


def _file_subject(path: Path, model: nn.Module, layers: Iterable[str], example: ExampleInputs) -> Subject:
    try:
        if path.name.endswith(".safetensors"):
            loaded = load(path, restore_(copy.deepcopy(model)))
            return DeployedSubject(path.name, loaded, layers, model, path, is_file=True)
        if path.name.endswith(".onnx"):
            return OnnxSubject(path, convert(model).cpu(), layers, example)
        if path.name.endswith(".npz"):
            return ArraysSubject(path, convert(model).cpu(), layers, example)
        if path.name.endswith(".pt2"):
            return ProgramSubject(path, convert(model).cpu(), layers, example)
    except FileFormatError as error:
        return Unreadable(path.name, str(error))
    raise ConfigError(
        f"verify: expected a file ending in {', '.join(ENDINGS)}; found {path.name}. Rename it, or give another one."
    )


#: A task's own score: ``metric(model, loader)``.
Metric = Callable[[nn.Module, Iterable[Any]], float]


@torch.no_grad()
def verify(
    model: nn.Module,
    *artifacts: Artifact | Iterable[Any],
    loader: Iterable[Any] | None = None,
    file: str | Path | None = None,
    metric: Metric | None = None,
) -> VerifyResult:
    """Compare a trained model with what was deployed, from single numbers to the task.

    ==  ==========================================================================================================
    E0  static: integers, scales, zero points, limits and what stays float are bit-equal; so is the file read back,
        and its size is the promised one
    E1  layers: on the same input the same codes, and an output within 1e-5 of its largest value; what the trained
        outputs become on the way to the next layer has the same codes there, but for 1e-4 of them (one at least, more
        above 8 bits) that may flip by one level, as float sums run in another order; a product inside attention is a
        layer with two inputs
    E2  noise: the mean distance of the logits is at most 3 times the trained model's distance to itself when the batch
        size or the kernels change, or what flipped codes make, 3 % of the largest logit each: as many as E1 counted and
        chance adds, three at least, one in twenty samples at most;
        top-1 disagrees at a rate of at most 0.5 %, or 3 times the trained model's with itself, and what chance adds to
        the count in 98 % of cases
    E3  exact: equal to the trained model in phase ``"int"``, codes and outputs, without any tolerance
    ==  ==========================================================================================================

    Which rungs an artifact has to climb, ``docs/verify.md`` says: a file of floats, such as ONNX, cannot reach E3.

    Args:
        model: prepared and trained, bits frozen; its phase and modes are restored.
        *artifacts: what ``nipq.convert`` or ``nipq.load`` returned, what ``nipq.runtime`` compiled, or files:
            ``.nipq.safetensors``, ``.onnx``, ``.qonnx.onnx``, ``.npz``, ``.pt2``. The last one may be the loader.
        loader: batches as for ``nipq.calibrate_``, at least one; a few hundred samples of real data do. All that the
            loader yields is used.
        file: the packed file of the one deployed module among the artifacts, to be checked with it.
        metric: the task's score, called as ``metric(model, loader)`` on every model. Without one, top-1 accuracy in per
            cent when the batches hold labels (second item of a tuple, or ``"labels"`` of a dict).

    Returns:
        A :class:`VerifyResult`, true when every rung of every artifact holds. A file that cannot be read fails E0.

    Raises:
        OrderError: if the model is not prepared, or its bits are not frozen.
        ConfigError: if there is no artifact or no batch, or an artifact is nothing that was deployed.
        MissingDependencyError: if a package that reads a file is not installed.
    """
    candidates, batches = _sorted_out(artifacts, loader)
    _check(model, candidates, file)
    names = {module: name for name, module in model.named_modules()}
    rows = {names[row.layer]: row for row in layer_table(model)}
    with _evaluating(model, [artifact for artifact in candidates if isinstance(artifact, nn.Module)]):
        example = _first_inputs(batches)
        packed = None if file is None else Path(file)
        subjects = [subject_of(artifact, model, places(rows), example, packed) for artifact in candidates]
        rungs = {subject: [subject.static()] for subject in subjects}
        for seen in observations(model, rows, batches):
            for subject in subjects:
                subject.observe(seen)
        scores = _scores(model, subjects, batches, metric)
        for subject in subjects:
            rungs[subject] += subject.rungs(scores[subject])
    return VerifyResult(tuple(_named(rung, subject, subjects) for subject in subjects for rung in rungs[subject]))


def _sorted_out(
    artifacts: Sequence[Artifact | Iterable[Any]], loader: Iterable[Any] | None
) -> tuple[list[Artifact], Iterable[Any]]:
    """Candidates and batches; a loader that can be read only once is kept."""
    candidates = list(artifacts)
    if loader is None and artifacts:
        last = artifacts[-1]
        if not isinstance(last, (nn.Module, str, Path)):
            loader, candidates = last, candidates[:-1]
    found = [artifact for artifact in candidates if isinstance(artifact, (nn.Module, str, Path))]
    if loader is None or not found or len(found) < len(candidates):
        raise ConfigError(
            f"verify: expected deployed models or files and one loader, found {len(found)} of {len(candidates)} and "
            f"{'no' if loader is None else 'one'} loader. Call nipq.verify(model, deployed, loader)."
        )
    return found, list(loader) if isinstance(loader, Iterator) else loader


def _check(model: nn.Module, candidates: Sequence[Artifact], file: str | Path | None) -> None:
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a frozen bit-width, found one that is still learned. "
                "Call nipq.freeze_bits_(model, budget) and nipq.convert(model) before nipq.verify."
            )
    modules = sum(isinstance(artifact, nn.Module) for artifact in candidates)
    if file is not None and modules != 1:
        raise ConfigError(
            f"verify: expected one deployed module with file={str(file)!r}, found {modules}. "
            "Give the file as one of the artifacts."
        )


def _first_inputs(loader: Iterable[Any]) -> ExampleInputs:
    for batch in loader:
        return inputs_of(batch)
    raise ConfigError("verify: expected at least one batch, found an empty loader. Give some real data.")


@contextmanager
def _evaluating(model: nn.Module, others: Sequence[nn.Module]) -> Iterator[None]:
    """All of them in evaluation mode; modes and phase are restored."""
    modes = {module: module.training for part in (model, *others) for module in part.modules()}
    phase = phase_of(model)
    try:
        for part in (model, *others):
            part.eval()
        yield
    finally:
        set_phase_(model, phase)
        for module, training in modes.items():
            module.training = training


def _scores(
    model: nn.Module, subjects: Sequence[Subject], loader: Iterable[Any], metric: Metric | None
) -> dict[Subject, dict[str, float]]:
    """The task's score of the trained model and of each subject."""
    if metric is None:
        return {subject: subject.distance.scores() for subject in subjects}
    set_phase_(model, Phase.ROUND)
    trained = metric(model, loader)
    scores = {s: {"metric_trained": trained, "metric_deployed": metric(s.module, loader)} for s in subjects if s.module}
    return {subject: scores.get(subject, {}) for subject in subjects}


def _named(rung: Rung, subject: Subject, subjects: Sequence[Subject]) -> Rung:
    """The rung with its artifact; a module that is alone needs no name."""
    return replace(rung, artifact=subject.name if subject.is_file or len(subjects) > 1 else "")
