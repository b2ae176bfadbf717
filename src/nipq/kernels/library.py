"""The compiled kernels for CPUs: compiled on first use, kept for the next process, done without where impossible."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("source")

#: Set to 0 to do without compiled kernels.
SWITCH = "NIPQ_KERNELS"

#: Set to a folder for what was compiled; else it goes where the platform keeps caches.
CACHE = "NIPQ_CACHE"

FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp",
    "-ffp-contract=off",  # a multiply and an add round twice, as in torch
    "-fno-math-errno", "-fno-trapping-math",  # let rounding be one instruction; neither changes a value
)  # fmt: skip


class CompilerError(Exception):
    """The kernels could not be compiled or loaded; the message says why."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no working C++ compiler (said once, as a warning).

    The compiler is ``$CXX``, or the first of c++, g++, clang++ on the path. Compiling takes a second, once a machine.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _load(_compiled())
    except (CompilerError, OSError) as error:
        warnings.warn(
            f"nipq trains with plain torch operations, about 1.5 times slower on a CPU: {error} "
            f"Install a C++ compiler, or set {SWITCH}=0 to silence this.",
            stacklevel=2,
        )
        return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no type
def available() -> bool:
    """Whether there are compiled kernels; a constant to ``torch.compile``."""
    return library() is not None


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not there yet."""
    compiler = _compiler()
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.?pp")))
    parts = (*sources, " ".join(FLAGS), _output([compiler, "--version"]), _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = cache_folder() / f"kernels-{name}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder, "cpu.o"), Path(folder, "cpu.so")
        _output([compiler, *FLAGS, "-c", str(SOURCE / "cpu.cpp"), "-o", str(compiled)])
        # Linked without an OpenMP runtime: its symbols are found in the one that torch has loaded. A second runtime
        # would bring threads of its own, which wait in a loop on the cores that torch's threads need.
        _output([compiler, "-shared", *_undefined_allowed(), str(compiled), "-o", str(linked)])
        linked.replace(target)  # another process may do the same at this moment; both files are equal
    return target


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    for name, arguments in {
        "nipq_proxy_forward": 3, "nipq_proxy_backward": 6, "nipq_round_forward": 3, "nipq_round_backward": 6,
    }.items():  # fmt: skip
        function = getattr(loaded, name)
        function.argtypes, function.restype = [pointer] * arguments, None
    return loaded


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CompilerError("there is no C++ compiler on the path.")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise CompilerError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.machine())


def _undefined_allowed() -> list[str]:
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []


def cache_folder() -> Path:
    """Where what was compiled or measured on this machine is kept."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nipq"
