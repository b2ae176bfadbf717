"""Training loops of other libraries timed side by side: a few steps of the one, a few of the other, and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


class Turns:
    """Loops in threads, of which one runs at a time: what slows the machine down for a while slows all of them.

    A loop cannot be asked to make one step when it belongs to a library. So it calls :meth:`step` where each of its
    steps begins, and is held there until its turn comes.

    Args:
        block: steps of a turn.

    Example:
        >>> turns = Turns(block=2)
        >>> def loop():
        ...     for _ in range(5):
        ...         turns.step()
        >>> [len(blocks) for blocks in turns.run([loop, loop])]
        [2, 2]
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._gates: list[threading.Semaphore] = []
        self._running: list[int] = []
        self._own = threading.local()

    def run(self, loops: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Run all of them to their ends, torch on one thread.

        Args:
            loops: the first one begins.

        Returns:
            CPU seconds of each full block of steps by loop; what comes before the first step and after the last full
            block does not count.

        Raises:
            Exception: what a loop raised.
        """
        self._gates = [threading.Semaphore(0) for _ in loops]
        self._running = list(range(len(loops)))
        with ThreadPoolExecutor(len(loops)) as pool:
            futures = [pool.submit(self._one, place, loop) for place, loop in enumerate(loops)]
            self._gates[0].release()
        return [future.result() for future in futures]

    def step(self) -> None:
        """A step of the calling loop begins."""
        own = self._own
        if own.steps % self._block == 0:
            if own.steps:
                own.blocks.append(time.process_time() - own.began)
            self._let_next_go()
            self._gates[own.place].acquire()
            own.began = time.process_time()
        own.steps += 1

    def _one(self, place: int, loop: Callable[[], object]) -> list[float]:
        self._own.place, self._own.steps, self._own.blocks = place, 0, []
        torch.set_num_threads(1)  # torch has this by thread
        self._gates[place].acquire()
        try:
            loop()
        finally:
            self._let_next_go()
            self._running.remove(place)
        return self._own.blocks

    def _let_next_go(self) -> None:
        """Open the gate of the loop after this one; of this one itself if it is the last."""
        at = self._running.index(self._own.place)
        self._gates[self._running[(at + 1) % len(self._running)]].release()
