"""Checkpoints: written whole or not at all, read without running anything stored in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nipq.errors import FileFormatError
from nipq.files import written_whole

FORMAT = "nipq.train.checkpoint"
VERSION = 1


@dataclass
class Progress:
    """How far a run has come. Everything that is not in a state dict and cannot be derived from the config.

    Attributes:
        stage: ``float``, ``search``, ``finetune`` or ``done``.
        epoch: Epochs of the stage that are complete.
        step: Steps of the present epoch that are complete.
        sums: Loss, hits and images so far in the present epoch.
        rows: Rows of the metrics file that belong to this state.
        steps_total: Training steps since the start of the run.
        states: Metrics of each named state of the model (``float``, ``frozen``, ``bn``, ``finetuned``).
        seconds: Training time so far; the only entry that differs between runs.
    """

    stage: str = "float"
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rows: int = 0
    steps_total: int = 0
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Checkpoint:
    """All of a run at one moment.

    Attributes:
        progress: How far the run has come.
        model: State dict of the model.
        optimizers: States of the stage's optimizers, or ``None`` outside a stage.
        search: State of the bit search, or ``None``.
        average: State of the weight average, or ``None``.
        oscillation: State of what watches for oscillations, or ``None``.
    """

    progress: Progress
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]] | None = None
    search: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    oscillation: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write the file; a kill leaves the old or the new one."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "progress"}
        with written_whole(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, "progress": asdict(self.progress), **content}, temporary)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Args:
            path: The file.

        Returns:
            The checkpoint, on the CPU.

        Raises:
            FileFormatError: If the file is damaged, is something else, or is of another version.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FileFormatError(
                f"expected a checkpoint in {path}, could not read it ({reason}); restore the file or start a new folder"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FileFormatError(
                f"expected a checkpoint of nipq train in {path}, found something else; "
                "restore the file or start a new folder"
            )
        if content.get("version") != VERSION:
            raise FileFormatError(
                f"expected checkpoint version {VERSION} in {path}, found {content.get('version')!r}; "
                "continue with the nipq release that wrote it"
            )
        try:
            kept = {key: content[key] for key in ("model", "optimizers", "search", "average")}
            kept["oscillation"] = content.get("oscillation")  # older files have none
            return cls(progress=Progress(**content["progress"]), **kept)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"the checkpoint {path} lacks entries ({error}); start a new folder") from error
