"""The folder of a run: its files, written whole, never overwritten, continued under the same config only."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nipq.errors import ConfigError, FileFormatError, NipqError
from nipq.files import json_text, locked, parse_json, read_json, seal, written_whole
from nipq.train.config import TrainConfig, dump_config, load_config

PACKAGES = ("nipq", "torch", "torchvision", "numpy", "scipy", "pydantic", "safetensors", "scikit-learn")
#: What every row of the metrics file holds.
_ROW = {"stage": str, "epoch": int, "step": int}
#: Fields that may differ between a run and its continuation.
FREE_FIELDS = (
    ("data", "path"), ("data", "workers"), ("device",), ("checkpoint_every",),
    ("parallel", "strategy"), ("parallel", "timeout"),
)  # fmt: skip


class RunFolder:
    """Paths and files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Name the files; nothing is created."""
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.float = self.path / "float.pt"
        self.trained = self.path / "trained.pt"
        self.layers_csv = self.path / "layers.csv"
        self.layers_json = self.path / "layers.json"
        self.model = self.path / "model.nipq.safetensors"
        self.verify = self.path / "verify.json"
        self.results = self.path / "results.json"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.lock = self.path / ".lock"

    def check_free(self) -> None:
        """Raise ConfigError for a folder that holds anything but what a start that was killed left there."""
        left = {self.lock.name, self.environment.name}
        taken = self.path.exists() and not self.path.is_dir()
        if taken or (self.path.is_dir() and any(not self._is_left(found, left) for found in self.path.iterdir())):
            what = "already holds a run" if self.holds_run() else "is a file" if taken else "is not empty"
            raise ConfigError(
                f"expected a new run folder, found that {self.path} {what}; "
                "continue the run with --resume, or name another folder"
            )

    def _is_left(self, found: Path, names: set[str]) -> bool:
        """Return whether a file is one of a start that was killed, or a temporary one of it."""
        starts = tuple(f".{name}." for name in (self.environment.name, self.config.name))
        return found.name in names or found.name.startswith(starts)

    def claimed(self) -> AbstractContextManager[None]:
        """A context in which no other process trains in this folder; ConfigError if one does.

        Raises:
            ConfigError: if another process does, by its number and host.
        """
        if self.path.exists() and not self.path.is_dir():
            self.check_free()
        return locked(self.lock, alone=f"trains in {self.path}")

    def start(self, config: TrainConfig) -> None:
        """Claim an empty folder for a new run; ConfigError if it holds anything."""
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.environment, json_text(environment(), indent=2) + "\n")
        write_text(self.config, dump_config(config))

    def holds_run(self) -> bool:
        """Return whether a run was started here."""
        return self.config.is_file()

    def read_config(self) -> TrainConfig:
        """The config of the run; ConfigError if no run was started here."""
        if not self.holds_run():
            raise ConfigError(
                f"expected a run folder, found no config.yaml in {self.path}; name a folder made by nipq train"
            )
        return load_config(self.config)

    def check_same(self, config: TrainConfig) -> None:
        """Refuse to continue a run under another config.

        Args:
            config: the config given for the continuation.

        Raises:
            ConfigError: naming the fields that differ; where the data lie, workers, device and the checkpoint interval
                may, and so may what several processes do.
        """
        old, new = (flat(c.model_dump(mode="json")) for c in (self.read_config(), config))
        changed = [
            ".".join(k) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE_FIELDS
        ]
        if changed:
            raise ConfigError(
                f"the run in {self.path} was started with other settings: {', '.join(changed)} differ; "
                "resume with the same config, or start a new folder"
            )

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one line to the metrics file and flush it to the disk."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json_text(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the metrics file; a last line cut short by a kill is left out.

        Raises:
            FileFormatError: if a line is not one that a run writes.
        """
        if not self.metrics.exists():
            return []
        try:
            lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise FileFormatError(f"expected text in {self.metrics}, found something else; restore it") from error
        found = []
        for number, line in enumerate(lines, start=1):
            row = parse_json(line, f"{self.metrics}, line {number}")
            if not isinstance(row, dict) or not _ROW.items() <= {key: type(row.get(key)) for key in _ROW}.items():
                raise FileFormatError(
                    f"expected a row of an epoch in {self.metrics}, line {number}, found something else; restore it"
                )
            found.append(row)
        return found

    def read(self, path: Path, kind: type) -> Any:  # noqa: ANN401 - JSON
        """A JSON file of the run; None if it is not there yet.

        Args:
            path: one of the folder's files.
            kind: ``dict`` or ``list``.

        Raises:
            FileFormatError: if it holds something else.
        """
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, kind):
            raise damaged(path)
        return found

    def truncate_rows(self, count: int) -> None:
        """Keep the rows that belong to the checkpoint, dropping those written after it.

        Raises:
            FileFormatError: if the file has fewer rows than the checkpoint counts.
        """
        rows = self.rows()
        if len(rows) < count:
            raise FileFormatError(
                f"expected {count} rows in {self.metrics} for this checkpoint, found {len(rows)}; restore the file"
            )
        write_text(self.metrics, "".join(json_text(row) + "\n" for row in rows[:count]))


def damaged(path: Path) -> FileFormatError:
    """The error for a file of a run whose entries are not those that a run writes."""
    return FileFormatError(
        f"expected in {path} what nipq train writes there, found something else; restore it, or run nipq train again"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the entries of a damaged file into :func:`damaged`."""
    try:
        yield
    except NipqError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise damaged(path) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Save a state dict with its checksum, whole or not at all."""
    with written_whole(path) as temporary:
        torch.save(dict(state), temporary)
        seal(temporary)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV, whole or not at all."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()


def environment() -> dict[str, Any]:
    """Versions and machine: all that the numbers of a run depend on besides its config."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested fields by their path.

    Example:
        >>> flat({"a": {"b": 1}, "c": {}})
        {('a', 'b'): 1, ('c',): {}}
    """
    fields: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            fields.update(flat(value, (*prefix, key)))
        else:
            fields[(*prefix, key)] = value
    return fields
