"""What a run shows while it goes: a progress bar, TensorBoard scalars, a line per event."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nipq.errors import MissingDependencyError, require


class Reporter:
    """Shows a run on the terminal and in TensorBoard; with ``quiet`` only the latter.

    Args:
        tensorboard: Folder of the event files; ``None`` for none.
        step: Training steps that earlier parts of the run have logged; later ones are dropped from the display.
        quiet: Show nothing on the terminal.
    """

    def __init__(self, tensorboard: Path | None, step: int = 0, *, quiet: bool = False) -> None:
        """Open the writer; without the package the run goes on and says so."""
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self.console, transient=True, disable=quiet,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._writer: Any = None
        if tensorboard is None:
            return
        try:
            board = require("torch.utils.tensorboard", extra="report", purpose="TensorBoard logs")
            self._writer = board.SummaryWriter(str(tensorboard), purge_step=step or None)
        except MissingDependencyError as error:
            self.say(f"[yellow]no TensorBoard log: {error}")

    def __enter__(self) -> Self:
        """Start the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and close the writer."""
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self.console.print(text, highlight=False)

    def begin_epoch(self, title: str, total: int, done: int) -> None:
        """Start the bar of an epoch."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")

    def step(self, numbers: Mapping[str, float | None]) -> None:
        """Advance the bar and show the numbers that are known."""
        if self._task is not None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
            self._bar.update(self._task, advance=1, numbers=shown)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers against the training step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
