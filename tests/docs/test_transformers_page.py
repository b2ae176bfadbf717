"""The examples of the page on transformers run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parent.parent.parent / "docs" / "guide" / "transformers.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/guide/transformers.md", "exec"), names)
    said = capsys.readouterr().out
    assert "deployed model equals trained model" in said
    assert "attention_products" in said.replace("\n", "")
    assert names["tokens"].shape == (1, 12)
