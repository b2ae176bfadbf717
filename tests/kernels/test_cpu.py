"""Compiling the kernels: once, kept, found again, and done without where it cannot be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nipq.kernels.cpu as module
from nipq.files import CACHE
from nipq.kernels.cpu import SWITCH, library

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "fake"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_the_first_call_compiles_and_later_ones_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    library.cache_clear()
    assert library() is not None
    assert kept.stat().st_mtime_ns == written
    monkeypatch.setattr(module, "_processor", lambda: "another")
    library.cache_clear()
    assert library() is not None
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.distributed
@needs_compiler
def test_many_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = "from nipq.kernels.cpu import library; assert library() is not None"
    environment = os.environ | {CACHE: str(tmp_path / "shared")}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [path.suffix for path in (tmp_path / "shared").iterdir()] == [".so"]


def test_no_compiler_is_said_once_and_plain_operations_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler on the path. Install a C\+\+ compiler, or set NIPQ_KER"):
        assert library() is None
    assert library() is None


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("CXX", compiler(tmp_path, '[ "$1" = --version ] || { echo "out of ink" >&2; exit 1; }'))
    with pytest.warns(UserWarning, match="fake failed: out of ink"):
        assert library() is None
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_a_file_that_is_no_library_is_not_loaded(tmp_path: Path) -> None:
    target = module._compiled()
    target.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="plain torch operations"):
        assert library() is None


def test_the_switch_turns_the_kernels_off_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None
