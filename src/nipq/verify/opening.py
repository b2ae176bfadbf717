"""From what the caller names to what can be compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from nipq.errors import ConfigError, FileFormatError
from nipq.export.compiled import CompiledModel
from nipq.export.convert import convert
from nipq.export.load import load
from nipq.export.modules import deployed_layers
from nipq.prepare.prepare import restore_
from nipq.prepare.trace import ExampleInputs
from nipq.verify.arrays import ArraysSubject
from nipq.verify.candidate import Subject, Unreadable
from nipq.verify.compiled_subject import CompiledSubject
from nipq.verify.deployed import DeployedSubject
from nipq.verify.onnx_subject import OnnxSubject
from nipq.verify.program import ProgramSubject

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
