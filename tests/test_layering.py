"""Imports run downward only; ``docs/design.md`` section 3 draws the same floors.

An import may go to a lower floor, or along an arrow drawn here on the same floor. A folder's ``__init__`` may import
its own files; the inside of the package never imports ``nipq/__init__``. Imports stand at the top of a file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nipq

ROOT = Path(nipq.__file__).parent

#: From the ground up; a name stands for a module or for a folder with all its files.
FLOORS = (
    ("errors", "phases", "config", "config_faults", "files"),
    ("functional", "theory"),
    ("kernels",),
    ("nn",),
    (
        "finding",
        "float_pieces",
        "attention_trace",
        "trace",
        "plan",
        "shared_bits",
        "target",
        "attention_check",
        "validate",
        "prepare",
        "layer_table",
        "bit_table",
        "control",
        "deploy",
        "export",
    ),
    (
        "limit",
        "bit_programme",
        "budget",
        "controller",
        "search",
        "snap",
        "bit_start",
        "calibrate",
        "optim",
        "wrapping",
        "course",
        "batchnorm",
        "averaging",
        "distributed",
        "sharding",
        "synced_batchnorm",
        "oscillation",
        "analysis",
        "allocation",
        "inspection",
        "summary",
        "runtime",
        "verify",
    ),
    ("train", "integrations"),
    ("compare",),
    ("cli",),
    ("__init__", "__main__"),
)

#: Arrows on one floor: who imports, and what.
SIDEWAYS = {
    "config": "config_faults",
    "config_faults": "errors",
    "files": "errors",
    "functional.boundary": "functional.grid",
    "functional.empirical": "functional.counter functional.grid functional.truncation functional.uniform",
    "functional.noise": "functional.counter functional.empirical functional.grid functional.uniform",
    "functional.packing": "functional.grid",
    "functional.proxy": "functional.grid functional.truncation functional.uniform",
    "functional.tails": "functional.grid functional.truncation",
    "functional.uniform": "functional.grid functional.truncation",
    "theory": "functional.grid functional.tails functional.truncation functional.uniform",
    "functional.rivals": "functional.grid functional.uniform",
    "kernels.cpu": "kernels.call kernels.library",
    "kernels.backend": "kernels.cpu kernels.triton_proxy kernels.triton_rounding",
    "kernels.operators": "kernels.backend kernels.call",
    "kernels.proxy": "kernels.backend kernels.call kernels.operators",
    "kernels.rounding": "kernels.backend kernels.operators",
    "kernels.triton_proxy": "kernels.call kernels.triton_device kernels.triton_scalars kernels.triton_tiles",
    "kernels.triton_rounding": "kernels.call kernels.triton_device kernels.triton_scalars kernels.triton_tiles",
    "kernels.triton_scalars": "kernels.triton_device",
    "kernels.triton_tiles": "kernels.library",
    "kernels.triton_tuning": "kernels.call kernels.triton_device kernels.triton_proxy kernels.triton_tiles",
    "nn.attention": "nn.integer nn.layers",
    "nn.initial": "nn.quantizer",
    "nn.offset": "nn.quantizer",
    "nn.layers": "nn.integer nn.kinds nn.quantizer nn.relu",
    "nn.parameters": "nn.state",
    "nn.quantizer": "nn.estimator nn.parameters",
    "nn.relu": "nn.quantizer",
    "attention_check": "finding trace",
    "trace": "attention_trace float_pieces",
    "bit_table": "layer_table",
    "control": "layer_table",
    "deploy.convert": "control deploy.modules deploy.products layer_table",
    "deploy.file": "deploy.convert deploy.modules deploy.products",
    "deploy.container": "deploy.file",
    "deploy.load": "deploy.container deploy.modules deploy.products",
    "export.api": "deploy.modules export.arrays export.onnx_file export.portable export.program export.report trace",
    "export.arrays": "deploy.modules deploy.products export.inputs export.portable trace",
    "export.graph": "deploy.modules deploy.products export.inputs export.portable trace",
    "export.inputs": "trace",
    "export.onnx_file": "deploy.modules export.graph export.portable export.qcdq export.qonnx export.report trace",
    "export.onnx_input": "deploy.modules export.graph export.portable",
    "export.onnx_layer": "deploy.modules export.onnx_input export.portable",
    "export.portable": "deploy.modules deploy.products",
    "export.promise": "deploy.convert deploy.modules export.onnx_file layer_table trace",
    "export.program": "export.inputs trace",
    "export.qcdq": "deploy.modules export.graph export.onnx_input export.onnx_layer export.portable",
    "export.qonnx": "deploy.modules export.graph export.onnx_input export.onnx_layer export.portable",
    "prepare": "attention_trace control layer_table plan shared_bits trace validate",
    "shared_bits": "plan",
    "target": "plan",
    "validate": "attention_check finding plan shared_bits target trace",
    "allocation": "analysis.curvature analysis.hessian analysis.network bit_programme budget calibrate "
    "distributed.__init__ snap",
    "analysis.corruption": "analysis.network analysis.sweep",
    "analysis.curvature": "analysis.hessian analysis.network",
    "analysis.hessian": "analysis.network calibrate",
    "analysis.landscape": "analysis.network analysis.sweep",
    "analysis.lowered": "analysis.network analysis.sweep calibrate",
    "analysis.perturbation": "analysis.network analysis.sweep",
    "batchnorm": "calibrate distributed.__init__ synced_batchnorm",
    "calibrate": "distributed.__init__",
    "synced_batchnorm": "distributed.__init__",
    "averaging": "distributed.__init__",
    "sharding": "distributed.__init__",
    "oscillation": "distributed.__init__",
    "bit_programme": "limit",
    "distributed.numbers": "distributed.ranks",
    "distributed.same": "distributed.numbers distributed.ranks",
    "bit_start": "bit_programme budget calibrate distributed.__init__",
    "budget": "limit",
    "integrations.accelerate": "integrations.guest",
    "integrations.lightning": "integrations.guest",
    "integrations.transformers": "integrations.guest",
    "course": "batchnorm budget distributed.__init__ optim search snap wrapping",
    "wrapping": "sharding",
    "inspection": "budget calibrate limit summary",
    "search": "budget controller distributed.__init__ limit optim wrapping",
    "snap": "bit_programme budget distributed.__init__ limit",
    "summary": "budget limit",
    "runtime.inductor": "runtime.compiled",
    "runtime.openvino": "runtime.compiled verify.onnx_cells verify.onnx_file",
    "verify.arrays_subject": "verify.archive verify.evidence verify.layers verify.places verify.reference "
    "verify.result verify.static verify.subject",
    "verify.compiled_subject": "runtime.compiled verify.result verify.subject",
    "verify.deployed": "verify.distance verify.evidence verify.layers verify.reference verify.result verify.static "
    "verify.subject",
    "verify.distance": "verify.result",
    "verify.evidence": "verify.result",
    "verify.ladder": "calibrate verify.opening verify.places verify.reference verify.result verify.subject",
    "verify.layers": "verify.evidence verify.places",
    "verify.onnx_cells": "verify.onnx_file verify.onnx_quantizer verify.places",
    "verify.onnx_forced": "verify.onnx_cells verify.onnx_file",
    "verify.onnx_quantizer": "verify.onnx_file",
    "verify.onnx_static": "verify.onnx_cells verify.onnx_file verify.static",
    "verify.onnx_subject": "verify.evidence verify.onnx_cells verify.onnx_file verify.onnx_forced verify.onnx_static "
    "verify.places verify.reference verify.result verify.subject",
    "verify.opening": "runtime.compiled verify.arrays_subject verify.compiled_subject verify.deployed "
    "verify.onnx_subject verify.program_subject verify.subject",
    "verify.program_subject": "verify.archive verify.evidence verify.result verify.subject",
    "verify.reference": "calibrate verify.distance verify.layers",
    "verify.static": "verify.places",
    "verify.subject": "verify.distance verify.evidence verify.reference verify.result",
}

#: Folders whose files may import each other, as long as there is no cycle: glue that nothing else builds on.
FREE_FOLDERS = ("train", "compare", "cli")


def modules(root: Path) -> dict[str, str]:
    """Source text of each module, by its name without the leading ``nipq.``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def imported(source: str) -> Iterable[tuple[str, bool]]:
    """Every module that the text imports, and whether the import stands inside a function."""
    tree = ast.parse(source)
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), id(node) in late
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in late


def floor_of(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if module in names or module.split(".")[0] in names:
            return number
    raise LookupError(f"{module} stands on no floor; add it to FLOORS and to docs/design.md")


def resolve(target: str, known: Iterable[str]) -> str:
    """The module that ``nipq.<target>`` means: a file, or a folder's ``__init__``."""
    return target if target in known else f"{target}.__init__"


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of our modules each of our modules imports."""
    return {
        module: {resolve(name[5:], sources) for name, _ in imported(source) if name.startswith("nipq.")}
        for module, source in sources.items()
    }


def faults(sources: dict[str, str]) -> list[str]:
    """Every import that breaks a rule, in words."""
    found = []
    for module, source in sources.items():
        for name, late in imported(source):
            if name.startswith("."):
                found.append(f"{module} imports {name}: write the full name")
            if name == "nipq":
                found.append(f"{module} imports nipq/__init__")
            if late:
                found.append(f"{module} imports {name} inside a function")
    arrows = graph(sources)
    for module, targets in arrows.items():
        found += [
            f"{module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})"
            for target in sorted(targets)
            if not allowed(module, target)
        ]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


def allowed(module: str, target: str) -> bool:
    above, below = floor_of(module), floor_of(target)
    if above != below:
        return above > below
    folder = module.split(".")[0]
    inside = target.split(".")[0] == folder
    if inside and (folder in FREE_FOLDERS or module == f"{folder}.__init__"):
        return True
    return target in SIDEWAYS.get(module, "").split()


def test_every_import_runs_downward_or_along_a_drawn_arrow() -> None:
    assert not faults(modules(ROOT))


def test_every_drawn_arrow_exists() -> None:
    sources = modules(ROOT)
    arrows = graph(sources)
    drawn = {(module, target) for module, targets in SIDEWAYS.items() for target in targets.split()}
    assert not {(module, target) for module, target in drawn if target not in arrows.get(module, ())}


def test_every_name_on_a_floor_exists() -> None:
    tops = {module.split(".")[0] for module in modules(ROOT)}
    assert {name for names in FLOORS for name in names} == tops


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("functional.planted", "from nipq.prepare import prepare_", "functional.planted (floor 1) imports prepare"),
        ("nn.planted", "if True:\n    import nipq.cli.app", "nn.planted (floor 3) imports cli.app (floor 8)"),
        ("train.planted", "import nipq.cli.app", "train.planted (floor 6) imports cli.app (floor 8)"),
        ("theory", "from nipq.nn import layers", "theory (floor 1) imports nn.__init__ (floor 3)"),
        ("optim", "from nipq.search import Search", "optim (floor 5) imports search (floor 5)"),
        ("functional.noise", "from nipq import Config", "functional.noise imports nipq/__init__"),
        ("functional.noise", "import nipq", "functional.noise imports nipq/__init__"),
        ("functional.noise", "from . import grid", "functional.noise imports .: write the full name"),
        ("nn.layers", "def f():\n    import json", "nn.layers imports json inside a function"),
        ("train.planted", "from nipq.train.other import a", "cycle: "),
    ],
)
def test_a_planted_import_is_caught(module: str, line: str, message: str) -> None:
    sources = modules(ROOT) | {"train.other": "from nipq.train.planted import b"}
    before = faults(sources | {"train.planted": ""})
    new = [fault for fault in faults(sources | {"train.planted": "", module: line}) if fault not in before]
    assert any(fault.startswith(message) for fault in new), new


def test_a_module_on_no_floor_is_caught() -> None:
    with pytest.raises(LookupError, match="utils stands on no floor"):
        faults(modules(ROOT) | {"utils": "import nipq.errors"})
