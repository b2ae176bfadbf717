"""Inductor recognises the trained layers, stays within their ranges, and leaves the others exact."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import nn

from nipq.errors import ConfigError
from nipq.export.inductor import Int8Layer, inductor_model
from nipq.export.portable import portable
from nipq.nn.deployed import DeployedLayer
from nipq.prepare.convert import convert
from nipq.verify import verify

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not torch.backends.mkldnn.is_available(), reason="Inductor needs g++ and oneDNN"
)


@pytest.mark.slow
@needs_compiler
def test_every_layer_is_recognised_and_the_task_agrees(trained: Any) -> None:
    pytest.importorskip("torchao")
    model, data = trained
    deployed = convert(model)
    compiled = inductor_model(deployed, data[0][0][:32])
    assert [kernel.name for kernel in compiled.kernels] == ["stem", "depthwise", "one", "two", "head"]
    assert all(kernel.integer for kernel in compiled.kernels), compiled.kernels
    with torch.no_grad():
        expected = deployed(data[0][0][:32])
    assert torch.allclose(compiled(data[0][0][:32]), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    result = verify(model, compiled, loader=[(data[0][0][:32], data[0][1][:32])])
    assert result, str(result)


def test_a_model_that_is_not_deployed_is_refused() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ConfigError, match="expected a deployed model, found a Linear without"):
        inductor_model(nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_compilers_form_is_the_deployed_layer(trained: Any) -> None:
    """Clamped range, zero point 128 for signed grids, positive scales: equal but for float rounding."""
    model, _ = trained
    for name, layer in convert(model).named_modules():
        if not isinstance(layer, DeployedLayer):
            continue
        form = Int8Layer(layer, portable(layer, name))
        shape = (64, layer.weight.shape[1] * getattr(layer.layer, "groups", 1), 5, 5)
        x = 9 * layer.code_high * layer.input_step * torch.randn(shape if layer.weight.ndim == 4 else shape[:2])
        with torch.no_grad():
            expected, found = layer(x), form(x)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max())), name
