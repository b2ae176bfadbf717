"""Results of deployed files: a line for each item, kept unless told otherwise; one process for each item."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nipq
from nipq.train.records import Record, Records, processor
from nipq.train.run_folder import installed_version
from nipq.verify import VerifyResult

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "torchao")
#: Characters of an error.
LONGEST = 450
#: Paths say where a machine keeps things, and nothing about a result.
PATH = re.compile(r"(?<![\w.])(?:/[\w.+-]+){2,}")


def parser(text: str | None, kind: str, timeout: int) -> argparse.ArgumentParser:
    """The options that all these scripts have.

    Args:
        text: docstring of the script.
        kind: name of its file of results.
        timeout: seconds that one item may take, by default.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--out", type=Path, default=RESULTS / f"{kind}.jsonl", help=f"file (default: results/{kind}.jsonl)"
    )
    found.add_argument("--overwrite", action="store_true", help="measure again what has a result")
    found.add_argument("--timeout", type=int, default=timeout, help="seconds for one item (default: %(default)s)")
    found.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one item, in this process
    return found


def origin(command: str, seconds: float) -> Record:
    """Origin of the numbers (command, machine, versions), without a path or a name of this machine.

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


def stored(path: Path) -> Records:
    """A file of results, whose lines are told apart by their item.

    Args:
        path: the file.
    """
    return Records(path, lambda record: str(record["item"]))


def write(path: Path, item: str, record: Record) -> None:
    """Write the result of an item, in place of one that it has: whoever calls has asked for it anew.

    Args:
        path: the file of results.
        item: name of the line.
        record: plain numbers, strings, lists and dictionaries.
    """
    stored(path).append({"item": item} | record, replace=True)


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
    found: list[Record] = result.to_dict()["checks"]
    for rung in found:
        if rung["first_difference"] is not None:
            rung["first_difference"] = short(rung["first_difference"])
    return found


def each(module: str, items: Sequence[tuple[str, Sequence[str]]], command: str, options: argparse.Namespace) -> int:
    """Measure items one after the other, each in a process of its own; those that have a result are done.

    Args:
        module: the script, for ``python -m``.
        items: name of each item's line, and the arguments that measure it.
        command: what a reader types, for the record of an item that did not end by itself.
        options: ``out``, ``overwrite`` and ``timeout``.

    Returns:
        How many failed to leave a result of their own.
    """
    failed = 0
    results = stored(options.out)
    for item, arguments in items:
        before = results.read().get(item)
        if before is not None and not options.overwrite:
            continue
        started = time.perf_counter()
        call = [sys.executable, "-W", "ignore", "-m", module, *arguments, "--out", str(options.out), "--here"]
        try:
            done = subprocess.run(call, cwd=ROOT, timeout=options.timeout, capture_output=True, text=True, check=False)
            reason = short((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
            ended = done.returncode == 0 and item in results.read()
        except subprocess.TimeoutExpired:
            reason, ended = f"longer than {options.timeout} s", False
        seconds = time.perf_counter() - started
        if not ended:
            failed += 1
            write(options.out, item, {"name": item.rpartition("/")[2], "error": reason} | origin(command, seconds))
        print(f"{item}: {results.read()[item].get('error', 'done')} ({seconds:.0f} s)", flush=True)
    return failed
