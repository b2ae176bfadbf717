"""Result files: one item each, written whole or not at all, kept unless told otherwise; one process for each item."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nipq
from nipq.compare.record import processor
from nipq.train.run_folder import installed_version, write_text
from nipq.verify import VerifyResult

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "torchao")
#: Characters of an error.
LONGEST = 450
#: Paths say where a machine keeps things, and nothing about a result.
PATH = re.compile(r"(?<![\w.])(?:/[\w.+-]+){2,}")

Record = dict[str, Any]


def parser(text: str | None, kind: str, timeout: int) -> argparse.ArgumentParser:
    """The options that all these scripts have.

    Args:
        text: docstring of the script.
        kind: folder of its results.
        timeout: seconds that one item may take, by default.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=RESULTS / kind, help=f"result folder (default: results/{kind})")
    found.add_argument("--overwrite", action="store_true", help="measure again what has a result file")
    found.add_argument("--timeout", type=int, default=timeout, help="seconds for one item (default: %(default)s)")
    found.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one item, in this process
    return found


def origin(command: str, seconds: float) -> Record:
    """Where numbers come from, without a path or a name of this machine.

    Args:
        command: what a reader types to get the same.
        seconds: that the item took.
    """
    versions = {name: found for name in PACKAGES if (found := installed_version(name)) is not None}
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "versions": {"nipq": nipq.__version__, "python": platform.python_version()} | versions,
        "command": command,
        "seconds": round(seconds, 1),
    }


def write(path: Path, record: Record) -> None:
    """Write a result file, whole or not at all.

    Args:
        path: where.
        record: plain numbers, strings, lists and dictionaries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_all(folder: Path) -> list[Record]:
    """Every record below a folder, by name.

    Args:
        folder: of result files.
    """
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]


def short(error: BaseException | str) -> str:
    """An error on one line, its middle left out if it is long, without paths.

    Args:
        error: what went wrong, or its text.

    Example:
        >>> short("cannot read /home/me/model.onnx: no such file")
        'cannot read model.onnx: no such file'
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = " ".join(line.strip() for line in text.splitlines() if line.strip())
    text = PATH.sub(lambda found: found.group().rsplit("/", 1)[1], lines)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 3]} ... {text[-2 * LONGEST // 3 :]}"


def rungs_of(result: VerifyResult) -> list[Record]:
    """Rungs as they are recorded: what a runtime said of a file holds its path and may be long.

    Args:
        result: of ``nipq.verify``.
    """
    found: list[Record] = result.to_dict()["rungs"]
    for rung in found:
        if rung["first_difference"] is not None:
            rung["first_difference"] = short(rung["first_difference"])
    return found


def each(module: str, items: Sequence[tuple[Path, Sequence[str]]], command: str, options: argparse.Namespace) -> int:
    """Measure items one after the other, each in a process of its own; those that have a result file are done.

    Args:
        module: the script, for ``python -m``.
        items: result file and arguments of each item.
        command: what a reader types, for the record of an item that did not end by itself.
        options: ``overwrite`` and ``timeout``.

    Returns:
        How many failed to leave a result of their own.
    """
    failed = 0
    for path, arguments in items:
        if path.exists() and not options.overwrite:
            continue
        started = time.perf_counter()
        before = path.stat().st_mtime_ns if path.exists() else 0
        call = [sys.executable, "-W", "ignore", "-m", module, *arguments, "--here"]
        try:
            done = subprocess.run(call, cwd=ROOT, timeout=options.timeout, capture_output=True, text=True, check=False)
            reason = short((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        except subprocess.TimeoutExpired:
            reason = f"longer than {options.timeout} s"
        seconds = time.perf_counter() - started
        if not path.exists() or path.stat().st_mtime_ns == before:
            failed += 1
            write(path, {"name": path.stem, "error": reason} | origin(command, seconds))
        print(
            f"{path.stem}: {json.loads(path.read_text(encoding='utf-8')).get('error', 'done')} ({seconds:.0f} s)",
            flush=True,
        )
    return failed
