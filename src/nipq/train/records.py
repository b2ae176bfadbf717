"""Results in one JSON-lines file: a record on each line, written whole or not at all, never replaced silently.

With it the two things that a record says of its origin: the processor, and the seconds of a training step.
"""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nipq.errors import ConfigError, FileFormatError
from nipq.files import json_text, locked, parse_json
from nipq.train.run_folder import write_text

Record = dict[str, Any]


def cell_name_of(record: Record) -> str:
    """Name of the cell that a record of ``nipq compare`` is about."""
    return str(record["cell"]["name"])


class Records:
    """The JSON-lines file of one experiment.

    Several processes may append to one file: a change is made under a lock, by a new file that takes the old one's
    name. So a reader finds the old or the new file, and a kill loses nothing.

    Args:
        path: the file; it need not exist.
        name_of: name of a record, which no other record of the file has.
    """

    def __init__(self, path: str | Path, name_of: Callable[[Record], str] = cell_name_of) -> None:
        """Remember the place; nothing is created."""
        self.path = Path(path)
        self._name_of = name_of

    def read(self) -> dict[str, Record]:
        """All records by name, in the order of their lines; none where there is no file.

        Raises:
            FileFormatError: if a line is not a record, or two have the same name.
        """
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # Not splitlines(), which also breaks at characters that JSON leaves inside a string.
        lines = text.removesuffix("\n").split("\n") if text else []
        found: dict[str, Record] = {}
        for number, line in enumerate(lines, start=1):
            place = f"{self.path}, line {number}"
            try:
                record = parse_json(line, place)
                name = self._name_of(record)
            except (ValueError, KeyError, TypeError) as error:
                raise FileFormatError(
                    f"{place}: expected a record, found something else ({type(error).__name__}: {error}); restore it"
                ) from error
            if name in found:
                raise FileFormatError(
                    f"{place}: expected one record of each name, found a second {name!r}; keep one of the two lines"
                )
            found[name] = record
        return found

    def append(self, record: Record, *, replace: bool = False) -> None:
        """Add a record at the end.

        Args:
            record: plain values for JSON.
            replace: let it take the place of the record with its name.

        Raises:
            ConfigError: if there is a record with its name that it may not replace.
        """
        name = self._name_of(record)
        with locked(self._lock):
            known = self.read()
            if name in known and not replace:
                raise ConfigError(
                    f"{self.path}: expected no record of {name!r}, found one; discard it first, or say that it may be "
                    "replaced"
                )
            self._write((known | {name: record}).values())

    def discard(self, names: Iterable[str]) -> None:
        """Remove the records of these names, where there are any."""
        unwanted = set(names)
        with locked(self._lock):
            known = self.read()
            if not unwanted.isdisjoint(known):
                self._write(record for name, record in known.items() if name not in unwanted)

    @property
    def _lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def _write(self, records: Iterable[Record]) -> None:
        write_text(self.path, "".join(json_text(record, ensure_ascii=False) + "\n" for record in records))


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of one training step in each stage, with its share of the epoch's validation.

    The median over the stage's epochs; its first epoch, which also holds the scores between stages, only counts where
    there is no other.

    Args:
        rows: rows of the metrics file, in order.

    Returns:
        Seconds by stage, and ``overall``, the mean over the steps of all stages but float, or of float alone.

    Example:
        >>> rows = [{"stage": "float", "step": 10, "seconds": 9.0}, {"stage": "float", "step": 20, "seconds": 11.0}]
        >>> seconds_per_step(rows)
        {'float': 0.2, 'overall': 0.2}
    """
    found: dict[str, list[float]] = {}
    steps: Counter[str] = Counter()
    step, seconds = 0, 0.0
    for row in rows:
        count = row["step"] - step
        if count > 0:
            found.setdefault(row["stage"], []).append((row["seconds"] - seconds) / count)
            steps[row["stage"]] += count
        step, seconds = row["step"], row["seconds"]
    each = {stage: statistics.median(values[1:] or values) for stage, values in found.items()}
    counted = [stage for stage in each if stage != "float"] or list(each)
    total = sum(steps[stage] for stage in counted)
    return each | ({"overall": sum(each[stage] * steps[stage] for stage in counted) / total} if counted else {})


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "") or (
        platform.processor()
    )
