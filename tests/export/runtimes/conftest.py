"""The trained net of the tests of verify, and its portable file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nipq.export.api import export
from nipq.prepare.convert import convert
from tests.verify.conftest import made


@pytest.fixture(scope="session")
def trained() -> Any:
    """A trained, prepared net with frozen bits, and its data; not to be changed."""
    return made()


@pytest.fixture(scope="session")
def folder(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its portable file, plain and packed."""
    pytest.importorskip("onnxscript")
    model, data = trained
    folder = tmp_path_factory.mktemp("runtime")
    export(convert(model), folder / "model.onnx", data[0][0][:3])
    export(convert(model), folder / "packed.onnx", data[0][0][:3], pack=True)
    return folder
