"""The error family and the import of optional dependencies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nipq import errors
from nipq.config import Phase


@pytest.mark.parametrize(
    "kind",
    [
        errors.NotQuantizableError,
        errors.ConfigError,
        errors.OrderError,
        errors.BudgetError,
        errors.NonFiniteError,
        errors.FileFormatError,
        errors.DistributedError,
        errors.MissingDependencyError,
    ],
)
def test_every_error_can_be_caught_as_the_base_and_as_a_value_error(kind: type[errors.NipqError]) -> None:
    with pytest.raises(errors.NipqError, match="expected") as caught:
        raise kind("expected this; found that")
    assert isinstance(caught.value, ValueError)


def test_require_returns_the_module() -> None:
    assert errors.require("math", extra="onnx", purpose="a test") is math


def test_require_names_the_package_the_purpose_and_the_extra() -> None:
    with pytest.raises(errors.MissingDependencyError) as caught:
        errors.require("nipq_has_no_such_module", extra="onnx", purpose="writing a file")
    message = str(caught.value)
    assert "'nipq_has_no_such_module'" in message
    assert "needed for writing a file" in message
    assert 'pip install "nipq[onnx]"' in message
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ImportError)


def test_require_reports_a_broken_dependency_of_the_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nipq_broken_extra.py").write_text("import nipq_missing_below\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(errors.MissingDependencyError, match="nipq_missing_below"):
        errors.require("nipq_broken_extra", extra="onnx", purpose="a test")


def test_phases_are_the_four_words_a_user_writes() -> None:
    assert [str(phase) for phase in Phase] == ["float", "noise", "round", "int"]
    assert Phase("int") is Phase.INT
    with pytest.raises(ValueError, match="quantized"):
        Phase("quantized")
