"""How large an ONNX file will be, said before training."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nipq.errors import OrderError
from nipq.export.convert import deploy_copy
from nipq.export.modules import deployed_layers
from nipq.export.onnx_file_export import onnx_bytes, qonnx_bytes
from nipq.prepare.layer_table import quantizers
from nipq.prepare.trace import ExampleInputs


@torch.no_grad()
def promised_bytes(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pack: bool = False,
    format: Literal["onnx", "qonnx"] = "onnx",
) -> int:
    """Bytes of the ONNX file that ``nipq.export`` will write of this model at its present bit-widths.

    They follow from the graph, the bit-widths and the kinds of grid, and not from a number that training moves, so the
    promise of an untrained model holds for the trained one. To try bit-widths: ``nipq.set_bits_`` on a copy. The one
    exception: float tensors outside of the quantized layers that turn out equal, number by number, are stored once, and
    the file is smaller by the other.

    Args:
        model: a prepared and calibrated model (bits still learned count as evaluation rounds them), or a deployed one.
        example_inputs: as for ``nipq.export``.
        pack: as for ``nipq.export``.
        format: ``"onnx"`` or ``"qonnx"``.

    Returns:
        Bytes on disk.

    Raises:
        OrderError: if the model is neither prepared nor deployed, or not calibrated.
        ConfigError: if the model cannot be traced.
        MissingDependencyError: if the packages that write ONNX are not installed.
    """
    twin = copy.deepcopy(model) if deployed_layers(model) else _deployed(model)
    _unlike(twin)
    if format == "qonnx":
        return len(qonnx_bytes(twin, example_inputs)[0])
    return len(onnx_bytes(twin, example_inputs, pack=pack)[0])


def _deployed(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model):
        if not quantizer.calibrated:
            raise OrderError(
                f"{quantizer.name}: expected a calibrated boundary, found none. Call nipq.calibrate_(model, loader): "
                "it chooses the grids, on which the size of an ONNX file depends."
            )
    return deploy_copy(model)


def _unlike(model: nn.Module) -> None:
    """Float pieces as training leaves them: no two parameters or running statistics equal, as fresh ones are."""
    layers = set(deployed_layers(model).values())
    draws = torch.Generator().manual_seed(0)
    for module in model.modules():
        if module in layers:
            continue
        found: list[Tensor | None] = list(module._parameters.values())
        if isinstance(module, _NormBase):
            found += [module.running_mean, module.running_var]
        for tensor in found:
            if tensor is not None and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draws) + 0.5)
