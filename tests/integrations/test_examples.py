"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "plain_loop": "sklearn",
    "lightning_trainer": "pytorch_lightning",
    "accelerate_loop": "accelerate",
    "transformers_trainer": "transformers",
}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "digits"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str, tmp_path: Path) -> None:
    for package in ("sklearn", EXAMPLES[name]):
        pytest.importorskip(package)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = re.search(r"quantized: ([\d.]+)", done.stdout)
    assert answer is not None
    assert float(answer[1]) > 0.9
