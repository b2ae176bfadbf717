"""How little a fresh process loads; each test asks a new interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nipq

SOURCE = Path(nipq.__file__).parents[1]

#: Slow to import, and of use in single functions only. Some come with torch itself, hence the difference below.
HEAVY = {
    "curvlinops", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas", "scipy", "sympy", "torch._dynamo",
    "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.func", "torchvision",
    "transformers", "triton",
}  # fmt: skip


def loaded_by(first: str, then: str) -> set[str]:
    """Modules that ``then`` loads in a fresh process after ``first``."""
    code = (
        "import json, sys\n"
        f"{first}\n"
        "before = set(sys.modules)\n"
        f"{then}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    environment = {"PYTHONPATH": str(SOURCE), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_nipq_loads_neither_torch_nor_any_room() -> None:
    loaded = loaded_by("pass", "import nipq")
    assert {name for name in loaded if name.startswith("nipq")} == {"nipq"}
    assert "torch" not in loaded
    assert "numpy" not in loaded


def test_public_names_load_no_heavy_package() -> None:
    loaded = loaded_by("import torch", "import nipq; [getattr(nipq, name) for name in nipq.__all__]")
    assert {"nipq.verify.api", "nipq.export.api"} <= loaded
    assert not loaded & HEAVY


def test_every_name_that_resolves_loads_no_heavy_package() -> None:
    loaded = loaded_by("import torch", "import nipq; [getattr(nipq, name) for name in nipq._HOMES]")
    assert not loaded & HEAVY
