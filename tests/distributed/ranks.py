"""Two processes in one gloo group that stay, so that a test does not pay for starting them.

Nothing here counts seconds: a call lasts as long as its processes live, however busy the machine is. What ends it early
is an event: where a rank dies, or fails in a call whose results are asked for, the parent ends the others.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WORLD = 2
#: Longer than any machine takes; gloo has no setting for "as long as the others live".
PATIENCE = timedelta(days=1)
#: The start method. A fork server imports torch once for all ranks; where there is none, every rank does it.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

Outcome = tuple[str, Any]


class Ranks:
    """Runs functions on all ranks of a group at once; the first call starts the processes."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        self.folder, self.world = folder, world
        self.processes: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of a test module returns on each rank; the first error of any rank is raised here.

        Ranks that have not answered by then are ended: they may wait for the one that failed.
        """
        found = {}
        for rank, (kind, content) in self._answers(function, *args):
            if kind == "gone":
                raise self._death(rank)
            if kind == "error":
                if len(found) + 1 < self.world:
                    self.close()
                raise content
            found[rank] = content
        return [found[rank] for rank in range(self.world)]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Outcome]:
        """``("result", value)`` or ``("error", exception)`` of each rank; none may die."""
        found = {}
        for rank, outcome in self._answers(function, *args):
            if outcome[0] == "gone":
                raise self._death(rank)
            found[rank] = outcome
        return [found[rank] for rank in range(self.world)]

    def survivors(self, function: Callable[..., Any], *args: Any) -> dict[int, Outcome]:
        """Outcomes of the ranks that live on, by rank; others may be dead before, or die within."""
        return {rank: outcome for rank, outcome in self._answers(function, *args) if outcome[0] != "gone"}

    def kill(self, rank: int) -> None:
        """End one process."""
        self.processes[rank].kill()
        self.processes[rank].join()
        self.pipes.pop(rank).close()

    def close(self) -> None:
        """End the processes; the next call starts others."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        for pipe in self.pipes.values():
            pipe.close()
        self.processes, self.pipes = {}, {}

    def _answers(self, function: Callable[..., Any], *args: Any) -> Iterator[tuple[int, Outcome]]:
        """Each rank and its outcome, in the order in which they come."""
        if not self.processes:
            self._start()
        task = pickle.dumps((function.__module__, function.__qualname__, args))
        waiting = dict(self.pipes)
        for pipe in waiting.values():
            with suppress(BrokenPipeError):  # it has died before; reading says so
                pipe.send_bytes(task)
        while waiting:
            ready = wait(waiting.values())
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                pipe = waiting.pop(rank)
                try:
                    outcome = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    outcome = ("gone", None)
                yield rank, outcome

    def _death(self, rank: int) -> RuntimeError:
        """The error that says how a rank ended; the others are ended, too."""
        self.processes[rank].join()
        status = self.processes[rank].exitcode
        self.close()
        return RuntimeError(f"rank {rank} ended with exit status {status} instead of an answer")

    def _start(self) -> None:
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(["torch"])
        place = tempfile.mkdtemp(dir=self.folder) + "/group"
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, place, there), daemon=True)
            process.start()
            there.close()
            self.pipes[rank], self.processes[rank] = here, process


def _serve(rank: int, world: int, place: str, pipe: Connection) -> None:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world, timeout=PATIENCE)
    environment = dict(os.environ)
    while True:
        try:
            module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                answer = ("result", getattr(importlib.import_module(module), name)(*args))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = ("error", error)
        _as_before(environment)
        pipe.send_bytes(pickle.dumps(answer))


def _as_before(environment: dict[str, str]) -> None:
    """Take back what a function told the whole process, so that the order of tests does not matter."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
