"""The folder of a comparison and the record of a finished cell, free of this machine's paths."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nipq.compare.cells import Cell
from nipq.compare.grid import Tree
from nipq.errors import ConfigError, FileFormatError
from nipq.train.config import TrainConfig, check_config
from nipq.train.run_folder import FREE_FIELDS, RunFolder, flat

STAGES = ("float", "search", "finetune")


class CompareFolder:
    """Paths of one comparison.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Name the files; nothing is created."""
        self.path = Path(path).resolve()
        self.table_markdown = self.path / "table.md"
        self.table_json = self.path / "table.json"
        self.plots = self.path / "plots"

    def record(self, name: str) -> Path:
        """Result file of a cell."""
        return self.path / "cells" / f"{name}.json"

    def run(self, name: str) -> RunFolder:
        """Run folder of a cell."""
        return RunFolder(self.path / "runs" / name)

    def log(self, name: str) -> Path:
        """What a cell's process printed."""
        return self.path / "logs" / f"{name}.log"

    def read(self, name: str) -> Tree | None:
        """The record of a cell, or ``None`` when it is not finished.

        Raises:
            FileFormatError: If the file is not a record.
        """
        path = self.record(name)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and {"cell", "config", "results"} <= record.keys():
                return record
            reason = "it lacks cell, config or results"
        except ValueError as error:
            reason = str(error)
        raise FileFormatError(f"expected the record of a cell in {path}, found something else: {reason}; restore it")

    def differences(self, cell: Cell) -> list[str]:
        """Fields in which a cell's finished or begun run differs from its config now; none when nothing was begun.

        What a run may change in its continuation (where data lie, the device) does not count.
        """
        record = self.read(cell.name)
        try:
            if record is not None:
                old = check_config(record["config"])
            elif self.run(cell.name).holds_run():
                old = self.run(cell.name).read_config()
            else:
                return []
        except ConfigError:
            return ["the whole config (it was written under other rules)"]
        before, now = (flat(self.portable(config)) for config in (old, check_config(cell.config)))
        keys = sorted(before.keys() | now.keys())
        return [
            f"{'.'.join(key)} (was {_short(before.get(key))}, is {_short(now.get(key))})"
            for key in keys
            if key not in FREE_FIELDS and before.get(key) != now.get(key)
        ]

    def portable(self, config: TrainConfig) -> Tree:
        """Every field of a config, without this machine's folders: the data's is left out, others lose theirs."""
        tree: Tree = self._relative(config.model_dump(mode="json"))
        tree["data"]["path"] = None
        return tree

    def located(self, config: Tree, data: str | None) -> TrainConfig:
        """The config of a cell with the places of weights and data on this machine."""
        tree = {**config}
        for section in ("model", "teacher"):
            part = tree.get(section)
            if isinstance(part, dict) and str(part.get("weights")).startswith("runs/"):
                tree[section] = {**part, "weights": str(self.path / part["weights"])}
        if data is not None:
            tree["data"] = {**tree["data"], "path": data}
        return check_config(tree)

    def _relative(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(value, dict):
            return {key: self._relative(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._relative(item) for item in value]
        if isinstance(value, str) and Path(value).is_absolute():
            path = Path(value)
            return path.relative_to(self.path).as_posix() if path.is_relative_to(self.path) else path.name
        return value


def make_record(folder: CompareFolder, grid: str, cell: Mapping[str, Any], config: TrainConfig) -> Tree:
    """Everything about a finished cell that a table, a plot or a sceptic needs.

    Args:
        folder: The comparison.
        grid: Its name.
        cell: ``name``, ``row``, ``budget`` and ``seed``.
        config: The config that ran.

    Returns:
        Plain values for JSON.
    """
    run = folder.run(cell["name"])
    results, layers, environment = (
        json.loads(path.read_text(encoding="utf-8")) for path in (run.results, run.layers_json, run.environment)
    )
    rows = run.rows()
    return {
        "grid": grid,
        "cell": dict(cell),
        "config": folder.portable(config),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": environment["cpu_threads"],
            "gpu": environment["cuda"],
        },
        "versions": {"python": environment["python"], **environment["packages"]},
        "results": results,
        "bops": sum(layer["bops"] for layer in layers),
        "learned_bits": learned_bits(rows),
        "seconds_per_step": seconds_per_step(rows),
    }


def learned_bits(rows: Sequence[Mapping[str, Any]]) -> Tree:
    """Soft bits ``[weight, activation]`` of every layer after the last search epoch, before they were snapped."""
    search = [row for row in rows if row["stage"] == "search" and "layer_bits" in row]
    return dict(search[-1]["layer_bits"]) if search else {}


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of one training step in each stage, with its share of the epoch's validation.

    The median over the stage's epochs; its first epoch, which also holds the scores between stages, only counts where
    there is no other.

    Args:
        rows: Rows of the metrics file, in order.

    Returns:
        Seconds by stage, and ``overall``, the mean over the steps of all stages but float, or of float alone.

    Example:
        >>> rows = [{"stage": "float", "step": 10, "seconds": 9.0}, {"stage": "float", "step": 20, "seconds": 11.0}]
        >>> seconds_per_step(rows)
        {'float': 0.2, 'overall': 0.2}
    """
    found: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    step, seconds = 0, 0.0
    for row in rows:
        count = row["step"] - step
        if count > 0:
            found.setdefault(row["stage"], []).append((row["seconds"] - seconds) / count)
            steps[row["stage"]] = steps.get(row["stage"], 0) + count
        step, seconds = row["step"], row["seconds"]
    each = {stage: statistics.median(found[stage][1:] or found[stage]) for stage in STAGES if stage in found}
    counted = [stage for stage in each if stage != "float"] or list(each)
    if not counted:
        return {}
    total = sum(steps[stage] for stage in counted)
    return each | {"overall": sum(each[stage] * steps[stage] for stage in counted) / total}


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
