"""``nipq doctor``: versions, device and optional parts of this machine."""

from __future__ import annotations

import platform
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer

from nipq.cli.output import FAILURE, JsonFlag, answer, show
from nipq.cli.reporting import reporting
from nipq.kernels.cpu import SWITCH, library
from nipq.kernels.triton_tuning import tune
from nipq.tables import Column, FittedTable

#: Distributions without which nothing works, and what the others are for.
REQUIRED = ("nipq", "torch", "numpy", "scipy", "pydantic", "rich", "typer", "safetensors", "PyYAML")
OPTIONAL = {
    "torchvision": "networks and image folders",
    "scikit-learn": "the digits data of the demo",
    "matplotlib": "plots",
    "tensorboard": "TensorBoard logs",
    "pandas": "tables of nipq compare",
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
    "transformers": "its Trainer as a host; experiments/tasks",
    "pytorch-lightning": "Lightning's trainer as a host",
    "accelerate": "nipq train; Accelerate or transformers as a host",
    "rdata": "the novels of experiments/tasks",
}


@dataclass(frozen=True)
class Examination:
    """Result of :func:`examine`.

    Attributes:
        python: version of Python.
        system: operating system and processor.
        threads: threads that torch uses.
        device: what ``device: auto`` means here.
        kernels: whether training on the CPU runs compiled kernels, or why not.
        required: versions of the core dependencies, ``None`` where one is missing.
        optional: versions of the optional ones.
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


def doctor(
    tune_gpu: Annotated[
        bool, typer.Option("--tune", help="Find sizes of the kernels that suit the GPU; a minute.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show versions, the device and which optional parts are installed."""
    with reporting(as_json):
        if tune_gpu:
            tuned = tune()
            if as_json:
                answer({**asdict(tuned), "file": str(tuned.file)})
            else:
                show(str(tuned))
            return
        found = examine()
        if as_json:
            answer(asdict(found), ok=not found.missing)
        else:
            _print(found)
        if found.missing:
            raise typer.Exit(FAILURE)


def _print(found: Examination) -> None:
    table = FittedTable(
        *(Column(heading, least=13) for heading in ("package", "version", "needed for")),
        title=f"Python {found.python}, {found.system}, {found.threads} threads, device {found.device}",
    )
    for name, installed in found.required.items():
        table.add_row(name, installed or "missing", "everything", style="" if installed else "red")
    for name, installed in found.optional.items():
        table.add_row(name, installed or "not installed", OPTIONAL[name], style="" if installed else "yellow")
    ready = f"missing: {', '.join(found.missing)}; install nipq again" if found.missing else "ready"
    show(table, f"CPU kernels: {found.kernels}", ready)


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
