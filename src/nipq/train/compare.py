"""Train methods x budgets x seeds in resumable cells: the grid file, its cells, their results, and the runner.

For each seed one float cell is trained first. Every other cell of the seed starts from its weights, so methods differ
in nothing but what their row says. Each cell is trained in a process of its own (:mod:`nipq.train.compare_cell`).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, model_validator

from nipq.config import Settings
from nipq.errors import ConfigError, FileFormatError, did_you_mean
from nipq.train.config import METHODS, BudgetConfig, TrainConfig, check_config, merged
from nipq.train.records import Record, Records
from nipq.train.run_folder import FREE_FIELDS, RunFolder, flat

Tree = dict[str, Any]

#: Label of the float cells.
FLOAT = "float"

#: Fields of a float cell under the grid's own ``float`` overrides: no budget, no teacher, no training of bits. It is
#: rounded to 8 bits at its end, which shows that the model can be quantized at all.
FLOAT_CELL: Tree = {
    "budget": None,
    "teacher": None,
    "quantization": {"weight_bits": 8, "activation_bits": 8},
    "stages": {"search": {"epochs": 0}, "finetune": {"epochs": 0}},
}

#: Program that trains one cell.
COMMAND = (sys.executable, "-m", "nipq.train.compare_cell")
#: Seconds between two looks at the running processes.
PAUSE = 0.1
#: Lines of a failed cell's log that are shown.
TAIL = 5

#: Fields that the grid says elsewhere, and where.
ELSEWHERE = {
    "seed": "seeds stand in the grid's seeds",
    "budget": "budgets stand in the grid's budgets",
    "method": "methods stand in the grid's rows",
    "model": "all rows start from the same float network",
}


class Grid(Settings):
    """Grid of a comparison, as its YAML file has it.

    Attributes:
        name: title of the table.
        base: fields of :class:`~nipq.train.config.TrainConfig` that all cells share. ``stages.float`` belongs to the
            float cells; a ``teacher`` without a factory is the seed's float network.
        float: fields of the float cells alone.
        budgets: section ``budget`` of a cell by label; ``null`` for methods that need none.
        methods: rows of the table by label: the word of a ``method``, a ``budgets`` list where the row is not for all
            of them, and any fields of the config. A plain list of words is short for rows of these names.
        seeds: one column of cells each.
        baseline: the row that is compared with the others; the first one if left out.
        against: the rows that it is compared with; all others if left out.

    Raises:
        ConfigError: if a field is wrong, or a label names nothing or two things.
    """

    name: str = Field(min_length=1)
    base: Tree
    float: Tree = Field(default_factory=dict)
    budgets: dict[str, Tree | None] = Field(min_length=1)
    methods: dict[str, Tree] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    baseline: str = ""
    against: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:  # noqa: ANN401 - what the YAML holds
        """Rows as mappings, budgets by text labels, the first row as baseline."""
        if not isinstance(value, Mapping):
            return value
        tree = dict(value)
        methods = tree.get("methods")
        if isinstance(methods, list):
            methods = {str(word): None for word in methods}
        if isinstance(methods, Mapping):
            rows = {str(label): row for label, row in methods.items()}
            tree["methods"] = {
                label: {"method": label} if row is None else {"method": row} if isinstance(row, str) else row
                for label, row in rows.items()
            }
            tree.setdefault("baseline", next(iter(rows), ""))
        if isinstance(tree.get("budgets"), Mapping):
            tree["budgets"] = {str(label): section for label, section in tree["budgets"].items()}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Grid:
        rows, faults = list(self.methods), []
        if FLOAT in rows:
            faults.append(f"expected no row of the name {FLOAT!r}, which is the float cells'; name it otherwise")
        for where, labels in (("baseline", [self.baseline]), ("against", self.against or ())):
            faults += [f"{where}: {_unknown(label, 'row', rows)}" for label in labels if label not in rows]
        sections: dict[str, Tree] = {"base": self.base, "float": self.float}
        sections |= {f"row {label!r}": row for label, row in self.methods.items()}
        for where, section in sections.items():
            keys = ("seed", "budget", "model" if where.startswith("row") else "method")
            faults += [
                f"{where}: expected no {key!r}, found {section[key]!r}; {ELSEWHERE[key]}"
                for key in keys
                if key in section
            ]
            only = section.get("budgets", []) if where.startswith("row") else []
            if not isinstance(only, list):
                faults.append(f"{where}: expected a list of budgets, found {only!r}; write budgets: [LABEL]")
                continue
            wrong = [str(budget) for budget in only if str(budget) not in self.budgets]
            faults += [f"{where}: {_unknown(budget, 'budget', self.budgets)}" for budget in wrong]
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            faults.append(f"seeds: expected different numbers from 0, found {list(self.seeds)}; correct them")
        if faults:
            raise ValueError("\n".join(faults))
        return self


def load_grid(path: str | Path) -> Grid:
    """Read a grid file.

    Args:
        path: the YAML file.

    Returns:
        The grid; the meaning of its rows is checked by :func:`expand`.

    Raises:
        ConfigError: if the file is missing, is not YAML, or a field is wrong.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a YAML grid file, found {str(path)!r}: {error}; see the guide") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"expected a mapping in {path}, found {type(tree).__name__}; see the guide")
    try:
        return Grid.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a valid grid:\n{error}") from error


def _unknown(word: str, kind: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"expected a known {kind} ({', '.join(known)}), found {word!r}; {did_you_mean(word, known, 'correct it.')}"


@dataclass(frozen=True)
class Cell:
    """One run of the grid; a float cell has the row ``float`` and no budget."""

    row: str
    budget: str | None
    seed: int
    #: All fields that differ from the defaults; weights of the float cell are named relative to the folder.
    config: Tree

    @property
    def name(self) -> str:
        """Name of its record, its run folder and its log."""
        return cell_name(self.row, self.budget, self.seed)

    @property
    def is_float(self) -> bool:
        """True if it trains the float network of its seed."""
        return self.budget is None

    @property
    def start(self) -> str:
        """Name of the float cell whose weights it starts from; a float cell's own name."""
        return cell_name(FLOAT, None, self.seed)

    def to_dict(self) -> Tree:
        """Name, row, budget and seed, as in a record."""
        return {"name": self.name, "row": self.row, "budget": self.budget, "seed": self.seed}


def cell_name(row: str, budget: str | None, seed: int) -> str:
    """Name of a cell.

    Example:
        >>> cell_name("LSQ+, dampened", "3/3", 0), cell_name("float", None, 0)
        ('LSQ+-dampened-3-3-seed0', 'float-seed0')
    """
    parts = [row, *([] if budget is None else [budget]), f"seed{seed}"]
    return "-".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts)


def expand(grid: Grid, presets: Mapping[str, Tree] = METHODS) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted grid is a table with fewer seeds.

    Args:
        grid: the grid.
        presets: config fields by word of a method.

    Returns:
        For each seed its float cell, then each budget's rows.

    Raises:
        ConfigError: naming the row and the field of everything that is wrong, before anything trains.
    """
    _check_sections(grid, presets)
    cells = list(_cells(grid, presets))
    faults: dict[str, None] = {}  # a fault in many cells is told once
    shared: set[str] = set()
    for cell in cells:
        try:
            check_config(cell.config)
        except ConfigError as error:
            lines = str(error.__cause__ or error).splitlines()
            if cell.is_float:
                shared.update(lines)
            where = "base and float" if cell.is_float else f"row {cell.row!r}"
            faults |= dict.fromkeys(f"{where}: {line}" for line in lines if cell.is_float or line not in shared)
    names = Counter(cell.name for cell in cells)
    twice = [name for name, count in names.items() if count > 1]
    faults |= dict.fromkeys(
        f"two cells would be called {name!r}; use labels that differ in letters or digits" for name in twice
    )
    if faults:
        raise ConfigError("\n".join(faults))
    return cells


def _check_sections(grid: Grid, presets: Mapping[str, Tree]) -> None:
    faults = []
    for label, row in grid.methods.items():
        if "method" not in row:
            word = label if label in presets else next(iter(presets))
            faults.append(f"row {label!r}: method: expected one, found none; write method: {word}")
        elif row["method"] not in presets:
            faults.append(f"row {label!r}: method: {_unknown(str(row['method']), 'method', presets)}")
    for label, section in grid.budgets.items():
        try:
            if section is not None:
                BudgetConfig.model_validate(section)
        except ConfigError as error:
            faults += [f"budgets, {label!r}: {line}" for line in str(error).splitlines()]
    if faults:
        raise ConfigError("\n".join(faults))


def _cells(grid: Grid, presets: Mapping[str, Tree]) -> Iterator[Cell]:
    shared = copy.deepcopy(grid.base)
    float_stage = (shared.get("stages") or {}).pop("float", {})
    for seed in grid.seeds:
        own = {"seed": seed}
        yield Cell(FLOAT, None, seed, merged(shared, {"stages": {"float": float_stage}}, FLOAT_CELL, grid.float, own))
        for budget, section in grid.budgets.items():
            for label, row in grid.methods.items():
                if budget in map(str, row.get("budgets", grid.budgets)):
                    fields = {key: value for key, value in row.items() if key != "budgets"}
                    config = merged(shared, presets[row["method"]], fields, own)
                    config["budget"] = copy.deepcopy(section)
                    yield Cell(label, budget, seed, _started(config, f"runs/{cell_name(FLOAT, None, seed)}/float.pt"))


def _started(config: Tree, weights: str) -> Tree:
    """The config with the float cell's weights in the model, and in a teacher that is the same network."""
    model, teacher = config.get("model"), config.get("teacher")
    if not isinstance(model, dict):
        return config
    network = {key: model[key] for key in ("factory", "kwargs") if key in model}
    config = {**config, "model": {**model, "weights": weights}}
    if isinstance(teacher, dict):
        teacher = teacher if "factory" in teacher else {**network, **teacher}
        same = all(teacher.get(key) == network.get(key) for key in ("factory", "kwargs"))
        config["teacher"] = {"weights": weights, **teacher} if same else teacher
    return config


class CompareFolder:
    """The folder of a comparison: one file of records, and a run folder and a log for each cell."""

    def __init__(self, path: str | Path) -> None:
        """Name the files; nothing is created."""
        self.path = Path(path).resolve()
        self.records = Records(self.path / "cells.jsonl")
        self.table_markdown = self.path / "table.md"
        self.table_json = self.path / "table.json"
        self.plots = self.path / "plots"

    def run(self, name: str) -> RunFolder:
        """Run folder of a cell."""
        return RunFolder(self.path / "runs" / name)

    def log(self, name: str) -> Path:
        """Output of a cell's process."""
        return self.path / "logs" / f"{name}.log"

    def read(self) -> dict[str, Record]:
        """The records of all finished cells by name.

        Raises:
            FileFormatError: if the file cannot be read, or a line is not the record of a cell.
        """
        found = self.records.read()
        for name, record in found.items():
            if not {"cell", "config", "results"} <= record.keys():
                raise FileFormatError(
                    f"{self.records.path}: expected cell, config and results in the record of {name}, found "
                    f"{', '.join(record)}; restore it"
                )
        return found

    def differences(self, cell: Cell, record: Record | None) -> list[str]:
        """Fields in which a cell's finished or begun run differs from its config now; none when nothing was begun.

        What a run may change in its continuation (where data lie, the device) does not count.
        """
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
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        return [
            f"{'.'.join(key)} (was {_short(before.get(key))}, is {_short(now.get(key))})"
            for key in changed
            if key not in FREE_FIELDS
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


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Outcome:
    """The end of a cell: ``skipped`` (had its result), ``done``, ``failed``, or ``blocked`` (its float cell failed)."""

    name: str
    state: str
    log: Path

    @property
    def ok(self) -> bool:
        """True if the cell has its result."""
        return self.state in ("skipped", "done")


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)


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
    """Run every cell; one that fails is reported and stops only those that start from it.

    Args:
        cells: as :func:`expand` orders them.
        folder: the comparison's folder. Called again after a stop of any kind, cells go on from their checkpoints.
        grid: name of the grid, for the records.
        data: folder of the data, for configs that name none.
        workers: cells side by side; ``None`` for one on each GPU, or one on the CPU.
        overwrite: discard results and runs whose config has changed, and everything that started from a changed float
            cell, instead of refusing.
        say: takes one line of progress.
        command: program of a cell's process; the job comes as a line on its standard input, which stays open as long
            as the runner lives.

    Returns:
        One outcome for each cell, in their order.

    Raises:
        ConfigError: if a result or a begun run has another config, before anything trains.
    """
    place = CompareFolder(folder)
    _check_changes(cells, place, overwrite=overwrite)
    done = place.read()
    needed = {cell.start for cell in cells if cell.name not in done}
    # A float cell is done when it has its record, and the weights that unfinished cells start from.
    states = {
        cell.name: "skipped"
        for cell in cells
        if cell.name in done and (cell.name not in needed or place.run(cell.name).float.is_file())
    }
    waiting = [cell for cell in cells if cell.name not in states]
    slots = environments(workers, visible_devices(), cells)
    running: list[_Running] = []
    if waiting:
        say(f"{len(waiting)} of {len(cells)} cells to run, {len(slots)} side by side")
    try:
        while waiting or running:
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                _let_go(item.process)
                ok = item.process.returncode == 0 and item.cell.name in place.read()
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
                job: Tree = {"folder": str(place.path), "grid": grid, "data": data}
                job |= {"cell": cell.to_dict(), "config": cell.config}
                running.append(_Running(cell, _start(job, place.log(cell.name), command, slots[slot]), slot))
            time.sleep(PAUSE if running else 0.0)
    finally:
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.wait()
            _let_go(item.process)
    return [Outcome(cell.name, states[cell.name], place.log(cell.name)) for cell in cells]


def visible_devices() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]


def environments(workers: int | None, devices: Sequence[str], cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Environment variables of each of the places that a cell can run in: GPUs in turn, or a share of the cores."""
    if all(cell.config.get("device") == "cpu" for cell in cells):
        devices = ()
    count = max(1, len(devices)) if workers is None else workers
    if count < 1:
        raise ConfigError(f"expected at least one worker, found {workers}; give --workers 1 or more")
    shared: dict[str, str] = {}
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:  # cells that set no threads share the cores
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return [shared | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}) for i in range(count)]


def _check_changes(cells: Sequence[Cell], place: CompareFolder, *, overwrite: bool) -> None:
    known = place.read()
    changed = {cell.name: found for cell in cells if (found := place.differences(cell, known.get(cell.name)))}
    if changed and not overwrite:
        lines = [f"{name}: {'; '.join(found)}" for name, found in changed.items()]
        raise ConfigError(
            f"expected the cells in {place.path} to be those of the grid, found other settings in:\n"
            + "\n".join(lines)
            + "\nPut the old settings back, name another folder with --run, or discard these cells, and all that start "
            "from a changed float cell, with --overwrite"
        )
    unwanted = [cell.name for cell in cells if cell.name in changed or cell.start in changed]
    if unwanted:
        place.records.discard(unwanted)
        for name in unwanted:
            shutil.rmtree(place.run(name).path, ignore_errors=True)


def _start(job: Tree, log: Path, command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
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


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def _report(item: _Running, place: CompareFolder, *, ok: bool, left: int) -> str:
    name, seconds = item.cell.name, time.monotonic() - item.started
    if ok:
        return f"done     {name}, {seconds:.0f} s; {left} left"
    log = place.log(name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"FAILED   {name}, exit status {item.process.returncode}; {log} ends with:", *lines])
