"""What holds for every runtime, with none installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError, MissingDependencyError
from nipq.export import inductor, openvino
from nipq.export.runtimes import CompiledModel, Kernel
from nipq.prepare.convert import convert
from nipq.verify import verify


class Wrapped(CompiledModel):
    """A model that says of itself what is wanted."""

    def __init__(self, model: nn.Module, *kernels: Kernel) -> None:
        super().__init__("Runtime", kernels, ())
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


INTEGER = Kernel("one", "u8", integer=True, expected=True)
EXCUSED = Kernel("two", "f32", integer=False, expected=False)
FLOAT = Kernel("head", "f32 jit", integer=False, expected=True)


def test_layers_that_should_be_integer_and_are_not_are_named(trained: Any) -> None:
    model, _ = trained
    good, bad = Wrapped(convert(model), INTEGER, EXCUSED), Wrapped(convert(model), INTEGER, FLOAT)
    good.check_integer()
    with pytest.raises(ConfigError, match=r"Runtime: expected integer kernels .* found floats for head \(f32 jit\)"):
        bad.check_integer()


def test_verify_looks_at_kernels_and_the_task(trained: Any) -> None:
    model, data = trained
    result = verify(model, Wrapped(convert(model), INTEGER, EXCUSED), loader=data)
    assert result, str(result)
    assert [check.name for check in result.checks] == ["E0 static", "E2 noise"]
    assert result.checks[0].numbers == {"layers": 2, "integer_kernels": 1}
    result = verify(model, Wrapped(convert(model), INTEGER, FLOAT), loader=data)
    assert [check.passed for check in result.checks] == [False, True]
    assert result.first_difference == "head: f32 jit"


def test_verify_notices_a_runtime_that_computes_otherwise(trained: Any) -> None:
    model, data = trained
    wrong = convert(model)
    wrong.two.offset += 0.3
    result = verify(model, Wrapped(wrong, INTEGER), loader=data)
    assert [check.passed for check in result.checks] == [True, False]


def test_openvino_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[openvino\]"):
        openvino.openvino_model("model.onnx", torch.zeros(1))


def test_torchao_is_asked_for_where_it_is_not_installed(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = trained
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[inductor\]"):
        inductor.inductor_model(convert(model), data[0][0])
