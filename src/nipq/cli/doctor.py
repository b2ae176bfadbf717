"""``nipq doctor``: can this machine do the work?"""

from __future__ import annotations

import platform
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from nipq.cli.output import answer
from nipq.kernels.cpu import SWITCH, library
from nipq.kernels.triton_tuning import tune

REQUIRED = ("nipq", "torch", "numpy", "scipy", "pydantic", "rich", "typer", "safetensors", "PyYAML")
OPTIONAL = {
    "torchvision": "networks and image folders",
    "scikit-learn": "the digits data of the demo",
    "matplotlib": "plots",
    "tensorboard": "TensorBoard logs",
    "onnxscript": "ONNX files",
    "onnx-ir": "ONNX files",
    "onnx": "ONNX files",
    "ml_dtypes": "packed ONNX files",
    "onnxruntime": "running ONNX files",
    "qonnx": "executing and costing QONNX files",
    "openvino": "integer kernels from OpenVINO",
    "torchao": "integer kernels from PyTorch's compiler",
    "curvlinops-for-pytorch": "curvature, HAWQ's allocation",
    "timm": "EfficientNet-Lite0 of experiments/tasks",
    "transformers": "its Trainer as a host; MiniLM of experiments/tasks",
    "pytorch-lightning": "Lightning's trainer as a host",
    "accelerate": "Accelerate as a host, and transformers' Trainer",
    "rdata": "the novels of experiments/tasks",
}


@dataclass(frozen=True)
class Examination:
    """What doctor found.

    Attributes:
        python: Version of Python.
        system: Operating system and processor.
        threads: Threads that torch uses.
        device: What ``device: auto`` means here.
        kernels: Whether training on the CPU runs compiled kernels, or why not.
        required: Versions of the core dependencies, ``None`` where one is missing.
        optional: Versions of the optional ones.
    """

    python: str
    system: str
    threads: int
    device: str
    kernels: str
    required: dict[str, str | None]
    optional: dict[str, str | None]

    @property
    def missing(self) -> list[str]:
        """Core dependencies that are not installed."""
        return [name for name, found in self.required.items() if found is None]


def examine() -> Examination:
    """Look at versions and devices; nothing is changed or fetched."""
    return Examination(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        device=f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu",
        kernels=_kernels(),
        required={name: _version(name) for name in REQUIRED},
        optional={name: _version(name) for name in OPTIONAL},
    )


def show_examination(found: Examination, *, as_json: bool) -> bool:
    """Print what was found.

    Args:
        found: Result of :func:`examine`.
        as_json: Print JSON.

    Returns:
        Whether the core dependencies are there.
    """
    ok = not found.missing
    if as_json:
        answer(asdict(found), ok=ok)
        return ok
    table = Table(title=f"Python {found.python}, {found.system}, {found.threads} threads, device {found.device}")
    for heading in ("package", "version", "needed for"):
        table.add_column(heading)
    for name, installed in found.required.items():
        table.add_row(name, installed or "[red]missing", "everything")
    for name, installed in found.optional.items():
        table.add_row(name, installed or "[yellow]not installed", OPTIONAL[name])
    console = Console()
    console.print(table)
    console.print(f"CPU kernels: {found.kernels}", soft_wrap=True)
    console.print("ready" if ok else f"missing: {', '.join(found.missing)}; install nipq again")
    return ok


def show_tuned(*, as_json: bool) -> None:
    """Find sizes of the kernels for this GPU and print them.

    Args:
        as_json: Print JSON.

    Raises:
        MissingDependencyError: If there is no GPU.
    """
    found = tune()
    if as_json:
        answer({**asdict(found), "file": str(found.file)}, ok=True)
    else:
        Console().print(str(found), soft_wrap=True)


def _kernels() -> str:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = library()
    if found is not None:
        return "compiled"
    return str(said[0].message) if said else f"switched off by {SWITCH}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
