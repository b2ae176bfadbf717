"""Two processes in one gloo group that stay, so that a test does not pay for starting them."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WORLD = 2
PATIENCE = 600


class Ranks:
    """Runs functions on all ranks of a group at once."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "group"), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of a test module returns on each rank; an error of any rank is raised here."""
        found = self.outcomes(function, *args)
        for kind, content in found:
            if kind == "error":
                raise content
        return [content for _, content in found]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
        """``("result", value)`` or ``("error", exception)`` of each rank."""
        task = pickle.dumps((function.__module__, function.__qualname__, args))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"rank {rank} gave no answer in {PATIENCE} s")
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                found.append(("gone", None))
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, place: str, pipe: Connection) -> None:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = ("result", getattr(importlib.import_module(module), name)(*args))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = ("error", error)
        pipe.send_bytes(pickle.dumps(answer))
