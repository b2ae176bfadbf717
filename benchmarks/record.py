"""Result files: what was measured, on which machine, with which versions, from which revision, by which command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nipq

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "brevitas", "diffq")


def parser(text: str | None, name: str, rounds: int, *, counts: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    Args:
        text: docstring of the script.
        name: of its result file.
        rounds: how many by default.
        counts: numbers of quantizers by default, for benchmarks that vary them.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl", help="result file (default: %(default)s)")
    found.add_argument("--overwrite", action="store_true", help="replace the result file")
    found.add_argument("--rounds", type=int, default=rounds, help="samples of each task (default: %(default)s)")
    if counts is not None:
        found.add_argument("--counts", nargs="+", type=int, default=list(counts), help="numbers of quantizers")
    return found


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Stop before anything is measured, rather than lose it afterwards.

    Args:
        path: the result file.
        overwrite: whether it may be replaced.

    Raises:
        SystemExit: if there is one.
    """
    if path.exists() and not overwrite:
        raise SystemExit(f"{path.name}: expected no such result file, found one. Give --overwrite, or another --out.")


def origin(load: tuple[float, float, float] | None = None) -> dict[str, Any]:
    """Origin of the numbers (machine, versions, revision), without a path or a name of this machine.

    Args:
        load: load averages before the measurement.
    """
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_before": None if load is None else [round(value, 2) for value in load],
        },
        "versions": {"nipq": nipq.__version__, "python": platform.python_version()} | _packages(),
        "revision": _revision(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a result file of one line, whole or not at all.

    Args:
        path: where.
        record: plain numbers, strings, lists and dictionaries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as stream:
        json.dump(record, stream, ensure_ascii=False)
        stream.write("\n")
    Path(stream.name).chmod(0o644)
    Path(stream.name).replace(path)


def read(name: str) -> dict[str, Any] | None:
    """A committed result file, or None where there is none.

    Args:
        name: without its ending.
    """
    path = RESULTS / f"{name}.jsonl"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load() -> tuple[float, float, float] | None:
    """Load averages of the machine, where it has them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return f"{model or platform.machine()}{', AVX512' if 'avx512f' in flags else ''}"


def _revision() -> str | None:
    """The commit, and whether the package differs from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
