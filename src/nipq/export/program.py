"""``torch.export`` programs: trace a deployed model with an open batch size, and write it as a PT2 file.

The file holds the deployed model as it is, whole codes and all, for PyTorch without the model's source. ONNX files are
made from the same program.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nipq.errors import ConfigError, NipqError
from nipq.prepare.batches import ExampleInputs


def program_bytes(deployed: nn.Module, example_inputs: ExampleInputs) -> tuple[bytes, bool]:
    """The program as ``torch.export.save`` writes it; ``torch.export.load(path).module()`` runs it.

    It computes the deployed model's outputs to the bit, and holds weights as int8 or int16.

    Args:
        deployed: a deployed model.
        example_inputs: its inputs.

    Returns:
        The file, and whether it takes batches of any size.

    Raises:
        ConfigError: if torch cannot trace the model.
    """
    program = exported_program(copy.deepcopy(deployed).cpu().eval(), example_inputs)
    program.example_inputs = None  # data have no place in a model file, and neither have paths of the code
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue(), open_batch(program)


def exported_program(model: nn.Module, example_inputs: ExampleInputs) -> torch.export.ExportedProgram:
    """``torch.export`` of a model, the first dimension of its inputs left open.

    Args:
        model: in evaluation mode, on the CPU.
        example_inputs: a tensor, a sequence of arguments, or a mapping of arguments by name.

    Returns:
        The program. A model that fixes the size of its batch gives a program of that size, see :func:`open_batch`.

    Raises:
        ConfigError: if torch cannot trace the model.
        NipqError: if the model's own layers raise it.
    """
    args, kwargs = call_arguments(example_inputs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    samples = len(leaves[0]) if leaves else None
    if samples == 1:  # torch.export takes a size of 1 for a constant
        args, kwargs = tree_map(_doubled, (args, kwargs))
        samples = 2
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch gives it no types
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == samples:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except NipqError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{type(model).__name__}: expected a model that torch.export can trace, found: {error}. "
            "Take control flow that depends on values out of its forward, or save it with nipq.save."
        ) from error


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of the call; tensors on the CPU.

    Args:
        example_inputs: a tensor, a sequence of arguments, or a mapping of arguments by name.

    Returns:
        ``(args, kwargs)``, one of them empty.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_on_cpu, (args, kwargs))
    return found


def open_batch(program: torch.export.ExportedProgram) -> bool:
    """Return whether the program takes batches of any size."""
    wanted = set(program.graph_signature.user_inputs)
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    # A size that the model turned out to fix is still a symbol, but one that prints as a number.
    return any(not str(size).isdigit() for value in given if isinstance(value, Tensor) for size in value.shape)


def _doubled(value: object) -> object:
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1:
        return value.repeat(2, *[1] * (value.ndim - 1))
    return value


def _on_cpu(value: object) -> object:
    return value.detach().cpu() if isinstance(value, Tensor) else value
