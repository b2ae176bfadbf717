"""Cells side by side, resumed, changed and failing; their processes here only pretend to train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nipq.errors import ConfigError, FileFormatError
from nipq.train.compare import Cell, CompareFolder, Grid, environments, expand, run_cells
from nipq.train.config import check_config

MakeGrid = Callable[..., Grid]

#: Writes what a finished cell leaves; PRETEND says which cells fail, stay, or wait for each other.
PROCESS = """
import json, os, pathlib, select, sys
job = json.loads(sys.stdin.readline())
name, folder = job["cell"]["name"], pathlib.Path(job["folder"])
with open(folder / "started.txt", "a") as file:
    file.write(name + "\\n")
do = json.loads(os.environ.get("PRETEND", "{}"))
if name in do.get("fail", []):
    print("first line\\nit broke here")
    sys.exit(3)
if name in do.get("stay", []):
    sys.stdin.read()  # until the runner ends
while name in do.get("meet", []) and len((folder / "started.txt").read_text().split()) < do["crowd"]:
    assert not select.select([sys.stdin], [], [], 0.01)[0], "the runner has ended"
if job["cell"]["budget"] is None:
    (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
    (folder / "runs" / name / "float.pt").touch()
with open(folder / "cells.jsonl", "a+") as file:
    file.seek(0)
    if name not in [json.loads(line)["cell"]["name"] for line in file]:
        record = {"cell": job["cell"], "config": job["config"], "data": job["data"], "results": {}}
        file.write(json.dumps(record) + "\\n")
"""


class Pretence:
    """A folder and the grid that is run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()
        self.records = CompareFolder(folder).records

    def run(self, grid: Grid, **settings: Any) -> dict[str, str]:
        """State of each cell by name."""
        command = (sys.executable, "-S", "-c", PROCESS)
        outcomes = run_cells(expand(grid), self.folder, say=self.said.append, command=command, **settings)
        return {outcome.name: outcome.state for outcome in outcomes}

    def started(self) -> list[str]:
        """Cells whose processes were started since the last look."""
        path = self.folder / "started.txt"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names


@pytest.fixture
def pretence(tmp_path: Path) -> Pretence:
    return Pretence(tmp_path)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda **do: monkeypatch.setenv("PRETEND", json.dumps(do))


def test_cells_run_once_and_in_order(make_grid: MakeGrid, pretence: Pretence) -> None:
    names = [cell.name for cell in expand(make_grid())]
    assert pretence.run(make_grid(), data="somewhere") == dict.fromkeys(names, "done")
    assert pretence.started() == names
    assert pretence.records.read()[names[1]]["data"] == "somewhere"
    assert pretence.run(make_grid()) == dict.fromkeys(names, "skipped")
    assert pretence.started() == []


def test_only_what_is_missing_runs(make_grid: MakeGrid, pretence: Pretence) -> None:
    pretence.run(make_grid())
    pretence.started()
    pretence.records.discard(["rival-4-4-seed0"])
    assert pretence.run(make_grid(seeds=[0, 1, 2]))["rival-4-4-seed0"] == "done"
    assert pretence.started() == ["rival-4-4-seed0", "float-seed2", "ours-4-4-seed2", "rival-4-4-seed2"]


def test_lost_float_weights_are_trained_again_only_where_a_cell_needs_them(
    make_grid: MakeGrid, pretence: Pretence
) -> None:
    pretence.run(make_grid())
    pretence.started()
    for seed in (0, 1):
        (pretence.folder / "runs" / f"float-seed{seed}" / "float.pt").unlink()
    pretence.records.discard(["ours-4-4-seed1"])
    pretence.run(make_grid())
    assert pretence.started() == ["float-seed1", "ours-4-4-seed1"]


def test_a_failing_cell_is_told_and_stops_no_other(
    make_grid: MakeGrid, pretence: Pretence, pretend: Callable[..., None]
) -> None:
    pretend(fail=["ours-4-4-seed0"])
    states = pretence.run(make_grid())
    assert [name for name, state in states.items() if state != "done"] == ["ours-4-4-seed0"]
    (told,) = [line for line in pretence.said if line.startswith("FAILED")]
    assert "exit status 3" in told
    assert "ours-4-4-seed0.log" in told
    assert "it broke here" in told
    pretence.started()
    pretend()
    assert pretence.run(make_grid())["ours-4-4-seed0"] == "done"
    assert pretence.started() == ["ours-4-4-seed0"]


def test_without_its_float_cell_a_seed_is_not_run(
    make_grid: MakeGrid, pretence: Pretence, pretend: Callable[..., None]
) -> None:
    pretend(fail=["float-seed0"])
    states = pretence.run(make_grid())
    assert [states[f"{name}-seed0"] for name in ("float", "ours-4-4", "rival-4-4")] == ["failed", "blocked", "blocked"]
    assert [states[f"{name}-seed1"] for name in ("float", "ours-4-4", "rival-4-4")] == ["done"] * 3
    assert "not run  ours-4-4-seed0: float-seed0 failed" in pretence.said


def test_workers_run_side_by_side(make_grid: MakeGrid, pretence: Pretence, pretend: Callable[..., None]) -> None:
    pretend(meet=["float-seed0", "float-seed1"], crowd=2)
    assert set(pretence.run(make_grid(), workers=2).values()) == {"done"}


def test_an_interrupt_ends_the_processes(
    make_grid: MakeGrid, pretence: Pretence, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(stay=["float-seed1"])

    def interrupt(line: str) -> None:
        if line.startswith("done"):
            raise KeyboardInterrupt

    monkeypatch.setattr(pretence, "said", [])
    with pytest.raises(KeyboardInterrupt):
        run_cells(
            expand(make_grid()),
            pretence.folder,
            workers=2,
            say=interrupt,
            command=(sys.executable, "-S", "-c", PROCESS),
        )
    assert "float-seed1" not in pretence.records.read()


CHANGED = {"ours": {"method": "nipq"}, "rival": {"method": "nipq", "label_smoothing": 0.2}}


def test_changed_settings_are_refused_before_anything_trains(make_grid: MakeGrid, pretence: Pretence) -> None:
    pretence.run(make_grid())
    pretence.started()
    before = pretence.records.path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        pretence.run(make_grid(methods=CHANGED, seeds=[0, 1, 2]))
    message = str(caught.value)
    assert "rival-4-4-seed0: label_smoothing (was 0.1, is 0.2)" in message
    assert "--overwrite" in message
    assert "ours" not in message
    assert pretence.started() == []
    assert pretence.records.path.read_bytes() == before


def test_overwrite_repeats_changed_cells_only(make_grid: MakeGrid, pretence: Pretence) -> None:
    pretence.run(make_grid())
    pretence.started()
    pretence.run(make_grid(methods=CHANGED), overwrite=True)
    assert pretence.started() == ["rival-4-4-seed0", "rival-4-4-seed1"]


def test_overwriting_a_float_cell_repeats_what_started_from_it(make_grid: MakeGrid, pretence: Pretence) -> None:
    pretence.run(make_grid())
    pretence.started()
    changed = make_grid(float={"optimizer": {"lr": 0.123}})
    with pytest.raises(ConfigError, match=r"float-seed0: optimizer\.lr \(was 0\.05, is 0\.123\)"):
        pretence.run(changed)
    pretence.run(changed, overwrite=True)
    assert pretence.started() == [cell.name for cell in expand(changed)]


def test_a_begun_run_of_other_settings_is_refused_too(make_grid: MakeGrid, pretence: Pretence) -> None:
    place = CompareFolder(pretence.folder)
    cell = next(cell for cell in expand(make_grid()) if cell.row == "rival")
    run = place.run(cell.name)
    run.start(place.located(cell.config, None))
    assert place.differences(cell, None) == []
    with pytest.raises(ConfigError, match="rival-4-4-seed0: label_smoothing"):
        pretence.run(make_grid(methods=CHANGED))
    pretence.run(make_grid(methods=CHANGED), overwrite=True)
    assert not run.path.exists()


def test_where_data_lie_and_the_device_do_not_count(make_grid: MakeGrid, pretence: Pretence) -> None:
    grid = make_grid()
    pretence.run(grid, data="here")
    pretence.started()
    base = {**grid.base, "data": {**grid.base["data"], "path": "/elsewhere"}, "device": "auto"}
    pretence.run(make_grid(base=base), data="there")
    assert pretence.started() == []


def test_records_of_another_kind_are_named(make_grid: MakeGrid, pretence: Pretence) -> None:
    pretence.records.append({"cell": {"name": "float-seed0"}})
    with pytest.raises(FileFormatError, match="expected cell, config and results in the record of float-seed0"):
        pretence.run(make_grid())
    pretence.records.path.write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"cells\.jsonl, line 1: expected a record, found something else"):
        pretence.run(make_grid())


def test_weights_and_data_are_found_and_then_forgotten(make_grid: MakeGrid, tmp_path: Path) -> None:
    place = CompareFolder(tmp_path)
    base = {**make_grid().base, "teacher": {}}
    cell = next(cell for cell in expand(make_grid(base=base)) if cell.row == "ours")
    config = place.located(cell.config, "/data/here")
    weights = str(tmp_path.resolve() / "runs" / "float-seed0" / "float.pt")
    assert config.teacher is not None
    assert (config.model.weights, config.teacher.weights, config.data.path) == (weights, weights, "/data/here")
    assert str(tmp_path.resolve()) not in json.dumps(place.portable(config))
    assert place.portable(config) == place.portable(check_config(cell.config))
    named = {**cell.config, "model": {**cell.config["model"], "weights": "/home/me/start.pt"}}
    assert place.portable(place.located(named, None))["model"]["weights"] == "start.pt"


def cells(**config: Any) -> list[Cell]:
    return [Cell("ours", "4/4", 0, config)]


def test_one_worker_on_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environments(None, ["0", "3"], cells()) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("0", "3")]
    three = environments(3, ["0", "3"], cells())
    assert [entry["CUDA_VISIBLE_DEVICES"] for entry in three] == ["0", "3", "0"]
    assert environments(None, ["0", "3"], cells(device="cpu")) == [{}]
    with pytest.raises(ConfigError, match="expected at least one worker, found 0"):
        environments(0, [], cells())


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert environments(4, [], cells()) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert environments(16, [], cells()) == [{"OMP_NUM_THREADS": "1"}] * 16
    assert environments(None, [], cells()) == [{}]
