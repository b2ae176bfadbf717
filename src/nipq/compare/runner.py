"""Running what is not done yet: cells side by side, each in a process of its own, each continued where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nipq.compare.cells import Cell
from nipq.compare.record import CompareFolder
from nipq.errors import ConfigError

COMMAND = (sys.executable, "-m", "nipq.compare.worker")
PAUSE = 0.1
"""Seconds between two looks at the running processes."""
TAIL = 5
"""Lines of a failed cell's log that are shown."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        name: The cell.
        state: ``skipped`` (it had its result), ``done``, ``failed``, or ``blocked`` (its float cell failed).
        log: What its process printed.
    """

    name: str
    state: str
    log: Path

    @property
    def ok(self) -> bool:
        """Whether the cell has its result."""
        return self.state in ("skipped", "done")


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Let go of the process's input, which tells it that its runner is there."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def run_cells(
    cells: Sequence[Cell],
    folder: str | Path,
    *,
    grid: str = "",
    data: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    command: Sequence[str] = COMMAND,
) -> list[Outcome]:
    """Bring every cell to its result; one that fails is told and stops only what starts from it.

    Args:
        cells: As :func:`~nipq.compare.cells.expand` orders them.
        folder: Where records, run folders and logs go. Called again after a stop of any kind, cells go on from their
            checkpoints.
        grid: Name of the grid, for the records.
        data: Folder of the data, for configs that name none.
        workers: Cells side by side; ``None`` for one on each GPU, or one on the CPU.
        overwrite: Discard results and runs whose config has changed, and everything that started from a changed float
            cell, instead of refusing.
        say: Takes one line of progress.
        command: Program of a cell's process; the job comes as a line on its standard input, which stays open as long
            as the runner lives.

    Returns:
        One outcome for each cell, in their order.

    Raises:
        ConfigError: If a result or a begun run has another config, before anything trains.
    """
    place = CompareFolder(folder)
    _check_changes(cells, place, overwrite=overwrite)
    states = {cell.name: "skipped" for cell in cells if _done(cell, cells, place)}
    waiting = [cell for cell in cells if cell.name not in states]
    slots = environments(workers, visible_devices(), cells)
    running: list[_Running] = []
    if waiting:
        say(f"{len(waiting)} of {len(cells)} cells to run, {len(slots)} side by side")
    try:
        while waiting or running:
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                item.close()
                ok = item.process.returncode == 0 and place.record(item.cell.name).is_file()
                states[item.cell.name] = "done" if ok else "failed"
                say(_report(item, place, ok=ok, left=len(waiting) + len(running)))
            for cell in [cell for cell in waiting if states.get(cell.start) in ("failed", "blocked")]:
                waiting.remove(cell)
                states[cell.name] = "blocked"
                say(f"not run  {cell.name}: {cell.start} failed")
            free = [slot for slot in range(len(slots)) if slot not in {item.slot for item in running}]
            ready = [cell for cell in waiting if cell.is_float or states.get(cell.start) in ("done", "skipped")]
            for cell, slot in zip(ready, free, strict=False):
                waiting.remove(cell)
                running.append(_Running(cell, _start(cell, place, grid, data, command, slots[slot]), slot))
            time.sleep(PAUSE if running else 0.0)
    finally:
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.wait()
            item.close()
    return [Outcome(cell.name, states[cell.name], place.log(cell.name)) for cell in cells]


def visible_devices() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` has to name for each GPU that this process may use."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]


def environments(workers: int | None, devices: Sequence[str], cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Environment variables of each of the places that a cell can run in.

    Args:
        workers: How many places; ``None`` for one on each device, or one.
        devices: GPUs, shared out in turn; none on a CPU.
        cells: Whether they leave the number of threads open decides who sets it.

    Returns:
        One set of variables for each place.

    Raises:
        ConfigError: If ``workers`` is below 1.
    """
    if all(cell.config.get("device") == "cpu" for cell in cells):
        devices = ()
    count = max(1, len(devices)) if workers is None else workers
    if count < 1:
        raise ConfigError(f"expected at least one worker, found {workers}; give --workers 1 or more")
    shared: dict[str, str] = {}
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:  # cells that set no threads share the cores
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return [shared | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}) for i in range(count)]


def _done(cell: Cell, cells: Sequence[Cell], place: CompareFolder) -> bool:
    """Whether a cell has its record, and a float cell the weights that unfinished cells start from."""
    if place.read(cell.name) is None:
        return False
    if not cell.is_float or place.run(cell.name).float.is_file():
        return True
    return all(place.read(other.name) is not None for other in cells if other.start == cell.name)


def _check_changes(cells: Sequence[Cell], place: CompareFolder, *, overwrite: bool) -> None:
    changed = {cell.name: found for cell in cells if (found := place.differences(cell))}
    if changed and not overwrite:
        lines = [f"{name}: {'; '.join(found)}" for name, found in changed.items()]
        raise ConfigError(
            f"expected the cells in {place.path} to be those of the grid, found other settings in:\n"
            + "\n".join(lines)
            + "\nPut the old settings back, name another folder with --run, or discard these cells, and all that start "
            "from a changed float cell, with --overwrite"
        )
    for cell in cells:
        if cell.name in changed or cell.start in changed:
            place.record(cell.name).unlink(missing_ok=True)
            shutil.rmtree(place.run(cell.name).path, ignore_errors=True)


def _start(
    cell: Cell,
    place: CompareFolder,
    grid: str,
    data: str | None,
    command: Sequence[str],
    variables: dict[str, str],
) -> subprocess.Popen[bytes]:
    named = {"name": cell.name, "row": cell.row, "budget": cell.budget, "seed": cell.seed}
    job = {"folder": str(place.path), "grid": grid, "cell": named, "config": cell.config, "data": data}
    log = place.log(cell.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables}
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended at once; its exit status and log say why
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return process


def _report(item: _Running, place: CompareFolder, *, ok: bool, left: int) -> str:
    name, seconds = item.cell.name, time.monotonic() - item.started
    if ok:
        return f"done     {name}, {seconds:.0f} s; {left} left"
    log = place.log(name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"FAILED   {name}, exit status {item.process.returncode}; {log} ends with:", *lines])
