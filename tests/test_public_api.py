"""The public names, and nothing else."""

from __future__ import annotations

import pkgutil
from types import ModuleType

import nipq


def test_every_public_name_is_there() -> None:
    names: dict[str, object] = {}
    exec("from nipq import *", names)
    assert set(nipq.__all__) <= names.keys()
    assert len(set(nipq.__all__)) == len(nipq.__all__)


def test_nothing_else_leaks() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(nipq.__path__)}
    others = {name for name in vars(nipq) if not name.startswith("_")} - set(nipq.__all__)
    assert others - {"annotations"} <= submodules


def test_no_public_name_is_a_module() -> None:
    """Functions such as ``nipq.summary`` share their name with the file they live in and must win."""
    assert not [name for name in nipq.__all__ if isinstance(getattr(nipq, name), ModuleType)]


def test_public_names_have_docstrings_and_live_in_nipq() -> None:
    for name in set(nipq.__all__) - {"__version__"}:
        thing = getattr(nipq, name)
        assert thing.__module__.startswith("nipq."), name
        assert thing.__doc__, name
