"""``nipq compare``: exit status, table, pictures and JSON; cells are made up, none is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nipq.cli import app
from nipq.errors import MissingDependencyError
from nipq.train.compare import CompareFolder, Outcome, expand, load_grid

GRID = """
name: tiny
base:
  model: {factory: "nipq.train.models:digits_net", kwargs: {width: 4}}
  data: {kind: digits}
  device: cpu
budgets: {4/4: {average_bits: {weights: 4, activations: 4}}}
methods: {ours: nipq, rival: {method: nipq, label_smoothing: 0.1}}
seeds: [0, 1]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID, encoding="utf-8")
    return path


@pytest.fixture
def folder(grid: Path, tmp_path: Path) -> Path:
    """A comparison whose cells are all done."""
    place = tmp_path / "compare"
    records = CompareFolder(place).records
    place.mkdir()
    for cell in expand(load_grid(grid)):
        states = {"float": {"test": {"accuracy": 90.0 + cell.seed}}}
        if not cell.is_float:
            states["frozen"] = {"test": {"accuracy": (89.0 if cell.row == "ours" else 80.0) + cell.seed}}
        record = {
            "cell": {"name": cell.name, "row": cell.row, "budget": cell.budget, "seed": cell.seed},
            "config": cell.config,
            "results": {
                "states": states,
                "average_bits": {"weights": 4.0, "activations": 4.0},
                "bytes": {"file": 5000, "float32": 20000},
                "verified": True,
            },
            "bops": 1e6,
            "seconds_per_step": {"overall": 0.1},
        }
        records.append(record)
    return place


def call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def call_json(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    status, output = call(*arguments, "--json")
    answer = json.loads(output)
    assert isinstance(answer, dict)
    return status, answer


def test_a_finished_grid_is_a_table(grid: Path, folder: Path) -> None:
    status, output = call(grid, "--run", folder)
    assert status == 0
    assert (
        "ours minus the best other method, rival: +9.00 ± 0.00 points (95 % interval, 2 seeds paired): better" in output
    )
    assert "89.50 ± 6.35" in output
    assert "89.50 ± 6.35" in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "plots" / "accuracy_against_bops.png").is_file()


def test_json(grid: Path, folder: Path) -> None:
    status, answer = call_json(grid, "--run", folder)
    assert (status, answer["ok"], answer["failed"]) == (0, True, [])
    assert answer["table"] == json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert answer["table"]["blocks"][0]["verdict"]["outcome"] == "better"


def test_table_only_trains_nothing(grid: Path, folder: Path) -> None:
    CompareFolder(folder).records.discard(["rival-4-4-seed1"])
    status, answer = call_json(grid, "--run", folder, "--table-only")
    assert status == 0
    assert answer["table"]["missing"] == ["rival-4-4-seed1"]
    assert not (folder / "runs").exists()
    status, answer = call_json(grid, "--run", folder / "empty", "--table-only")
    assert status == 1
    assert "found none" in answer["message"]


@pytest.mark.parametrize("all_fail", [False, True])
def test_a_failed_cell_is_status_1(all_fail: bool, grid: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcomes(cells: Any, *_: Any, **__: Any) -> list[Outcome]:
        bad = {cell.name for cell in cells} if all_fail else {"ours-4-4-seed0"}
        return [Outcome(cell.name, "failed" if cell.name in bad else "done", Path("log")) for cell in cells]

    monkeypatch.setattr("nipq.cli.compare.run_cells", outcomes)
    status, answer = call_json(grid, "--run", folder)
    assert (status, answer["ok"]) == (1, False)
    assert "ours-4-4-seed0" in answer["failed"]
    assert (answer["table"] is None) == all_fail
    status, output = call(grid, "--run", folder)
    assert status == 1
    assert all_fail or "1 cells have no result: ours-4-4-seed0" in output


def test_a_changed_grid_is_refused(grid: Path, folder: Path) -> None:
    grid.write_text(GRID.replace("0.1", "0.3"), encoding="utf-8")
    status, answer = call_json(grid, "--run", folder)
    assert status == 1
    assert "rival-4-4-seed0: label_smoothing (was 0.1, is 0.3)" in answer["message"]


def test_a_faulty_row_is_refused(grid: Path, folder: Path) -> None:
    grid.write_text(GRID.replace("ours: nipq", "ours: nipk"), encoding="utf-8")
    status, answer = call_json(grid, "--run", folder)
    assert status == 1
    assert "row 'ours': method: expected a known method" in answer["message"]


def test_without_matplotlib_there_is_still_a_table(grid: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise MissingDependencyError("no matplotlib")

    monkeypatch.setattr("nipq.cli.compare.plot_comparison", missing)
    status, output = call(grid, "--run", folder)
    assert status == 0
    assert "no plots: no matplotlib" in output
    assert (folder / "table.md").is_file()
