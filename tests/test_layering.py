"""Imports between rooms run downward, and there are no cycles between modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nipq

ROOT = Path(nipq.__file__).parent

#: From the ground up; a room imports from those before it and from itself.
ROOMS = (
    "errors", "config", "files", "tables", "functional", "kernels", "nn", "distributed", "prepare", "export",
    "budget", "qat", "verify", "report", "ptq", "integrations", "train", "cli", "__init__", "__main__",
)  # fmt: skip

#: Deepest chain of imports from the command line down to the errors.
LONGEST_CHAIN = 18

#: Imports inside functions: packages that are slow to import, where few calls need them.
LATE = {
    ("budget.allocate", "nipq.budget.hawq"),
    ("budget.hessian", "scipy.sparse.linalg"),
    ("budget.solver", "scipy.optimize"),
    ("budget.solver", "scipy.sparse"),
    ("distributed.fsdp", "torch.distributed.fsdp"),
    ("kernels.dispatch", "nipq.kernels"),  # Triton
    ("verify.metrics", "scipy.special"),
}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in ROOT.rglob("*.py")
    }


def when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when a module is imported: not in functions, nor what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not typing and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from when_imported(node)


def imported(tree: ast.AST, known: set[str], *, short: bool) -> Iterator[str]:
    for node in (when_imported if short else ast.walk)(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                name = full if full.removeprefix("nipq.") in known else str(node.module)
                if name.startswith("nipq."):
                    name = name.removeprefix("nipq.")
                    yield name if name in known else f"{name}.__init__"
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("nipq.") for alias in node.names if alias.name.startswith("nipq."))


def arrows(*, short: bool = False) -> dict[str, set[str]]:
    """Modules that each module imports; ``short`` leaves out what does not run when it is imported."""
    trees = modules()
    return {name: set(imported(tree, set(trees), short=short)) for name, tree in trees.items()}


def test_rooms_import_downward() -> None:
    floor = {room: number for number, room in enumerate(ROOMS)}
    upward = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if floor[target.split(".")[0]] > floor[module.split(".")[0]]
    ]
    assert not upward


def test_there_are_no_cycles() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError


def test_chains_are_short() -> None:
    graph, depth = arrows(short=True), dict[str, int]()
    for module in TopologicalSorter(graph).static_order():
        depth[module] = 1 + max((depth[target] for target in graph[module]), default=0)
    assert max(depth.values()) <= LONGEST_CHAIN


def test_no_module_is_above_700_lines_and_the_root_is_small() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "config", "errors", "files", "tables"}
    assert [path.name for path in ROOT.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 700] == []


def test_late_imports_are_those_of_slow_packages() -> None:
    """An import inside a function keeps ``import nipq`` and its public names fast; there is no other reason for one."""
    late = {
        (module, str(inner.module))
        for module, tree in modules().items()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(function)
        if isinstance(inner, ast.ImportFrom)
    }
    assert late <= LATE, late - LATE
