"""The public names, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import nipq
import nipq.export.api
import nipq.verify.api


def test_every_public_name_is_there() -> None:
    names: dict[str, object] = {}
    exec("from nipq import *", names)
    assert set(nipq.__all__) <= names.keys()
    assert len(set(nipq.__all__)) == len(nipq.__all__)


def test_tables_of_names_agree() -> None:
    """What is loaded on demand, what type checkers see, and what is public."""
    lazy = {(module, name) for module, names in nipq._PUBLIC.items() for name in names}
    tree = ast.parse(Path(nipq.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {(node.module, a.name) for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert lazy == typed
    assert {name for _, name in lazy} == set(nipq.__all__) - {"__version__"}


def test_nothing_else_is_listed() -> None:
    assert set(dir(nipq)) == set(nipq.__all__)


def test_no_public_name_is_a_module() -> None:
    """``nipq.export`` and ``nipq.verify`` share their names with the packages they live in, and win."""
    assert not [name for name in nipq.__all__ if isinstance(getattr(nipq, name), ModuleType)]


def test_packages_are_there_without_an_import_of_their_own() -> None:
    assert issubclass(nipq.errors.OrderError, nipq.NipqError)
    with pytest.raises(AttributeError, match="has no attribute 'cabbage'"):
        _ = nipq.cabbage


def test_public_names_have_docstrings_and_live_in_nipq() -> None:
    for name in set(nipq.__all__) - {"__version__"}:
        thing = getattr(nipq, name)
        assert thing.__module__.startswith("nipq."), name
        assert thing.__doc__, name
