"""A ``torch.export`` program: the deployed model as it is, whole codes and all, for PyTorch without its source."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from nipq.export.inputs import exported_program, open_batch
from nipq.prepare.trace import ExampleInputs


def program_bytes(deployed: nn.Module, example_inputs: ExampleInputs) -> tuple[bytes, bool]:
    """The program as ``torch.export.save`` writes it; ``torch.export.load(path).module()`` runs it.

    It computes what the deployed model computes, to the bit, and holds weights as int8 or int16.

    Args:
        deployed: a deployed model.
        example_inputs: what it is called with.

    Returns:
        The file, and whether it takes batches of any size.

    Raises:
        ConfigError: if torch cannot trace the model.
    """
    program = exported_program(copy.deepcopy(deployed).cpu().eval(), example_inputs)
    program.example_inputs = None  # somebody's data have no place in a model file, and neither has where the code lay
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue(), open_batch(program)
