"""A tiny grid on digits from end to end: records, table, pictures."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nipq.errors import ConfigError
from nipq.train.compare import Cell, CompareFolder, Grid, expand, run_cells
from nipq.train.compare_cell import end_with, run_job
from nipq.train.compare_plots import plot_comparison
from nipq.train.compare_table import compare
from nipq.train.records import seconds_per_step

SOURCE = Path(__file__).parents[2] / "src"


def job(cell: Cell, folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "grid": "tiny", "cell": cell.to_dict(), "config": cell.config, "data": None}


@pytest.fixture(scope="module")
def grid(tiny: dict[str, Any]) -> Grid:
    return Grid.model_validate({**tiny, "methods": ["nipq"], "seeds": [0]})


@pytest.fixture(scope="module")
def finished(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both cells are done; not to be changed."""
    folder = tmp_path_factory.mktemp("compare")
    for cell in expand(grid):
        run_job(job(cell, folder))
    return folder


def test_a_record_says_all_about_its_cell(finished: Path) -> None:
    records = CompareFolder(finished).read()
    record = records["nipq-4-4-seed0"]
    assert record["cell"] == {"name": "nipq-4-4-seed0", "row": "nipq", "budget": "4/4", "seed": 0}
    assert record["config"]["model"]["weights"] == "runs/float-seed0/float.pt"
    assert str(finished) not in json.dumps(records)
    assert record["machine"]["threads"] == 1
    assert {"python", "torch", "nipq"} <= record["versions"].keys()
    layers = json.loads((finished / "runs" / "nipq-4-4-seed0" / "layers.json").read_text(encoding="utf-8"))
    assert record["bops"] == sum(layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in layers)
    assert record["learned_bits"].keys() == {layer["name"] for layer in layers}
    assert record["seconds_per_step"]["overall"] > 0
    start = records["float-seed0"]
    assert record["results"]["states"]["float"] == start["results"]["states"]["float"], "it starts from that network"


def test_table_and_pictures(grid: Grid, finished: Path, tmp_path: Path) -> None:
    found = compare(grid, expand(grid), finished)
    (row,) = found.blocks[0].rows
    assert row.weight_bits is not None
    assert row.weight_bits <= 4
    assert row.verified == 1
    assert found.missing == ()
    pictures = plot_comparison(found, tmp_path)
    assert [picture.stem for picture in pictures] == ["accuracy", "accuracy_against_bops", "accuracy_against_bytes"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert len(image.convert("L").getcolors(256) or []) > 10


def test_the_process_of_a_cell_continues_it(grid: Grid, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    folder = tmp_path / "compare"
    shutil.copytree(finished, folder)
    records = CompareFolder(folder).records
    before = records.read()
    records.discard(["float-seed0"])
    outcomes = run_cells(expand(grid), folder, grid="tiny", say=lambda _line: None)
    assert [outcome.state for outcome in outcomes] == ["done", "skipped"], outcomes[0].log.read_text()
    assert records.read() == before


def test_a_float_network_that_comes_out_differently_is_refused(grid: Grid, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    shutil.copytree(finished, folder)
    start = expand(grid)[0]
    run_job(job(start, folder))  # the same numbers: nothing to say
    records = CompareFolder(folder).records
    record = records.read()[start.name]
    record["results"]["states"]["frozen"]["test"]["accuracy"] += 1.0
    records.append(record, replace=True)
    run_job(job(start, folder))  # no other cell starts from what its 8-bit check says
    record["results"]["states"]["float"]["test"]["accuracy"] += 1.0
    records.append(record, replace=True)
    with pytest.raises(ConfigError, match="came out with other numbers than its record"):
        run_job(job(start, folder))
    assert records.read()[start.name] == record


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is a POSIX one")
def test_two_processes_cannot_train_one_cell(grid: Grid, tmp_path: Path) -> None:
    import fcntl

    start = expand(grid)[0]
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / f"{start.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="expected to be the only process that trains float-seed0"):
            run_job(job(start, tmp_path))


def test_a_cell_ends_when_its_runner_does() -> None:
    reading, writing = os.pipe()
    ended: list[int] = []
    thread = end_with(reading, ended.append)
    os.write(writing, b"still here")
    while select.select([reading], [], [], 0)[0]:  # until the thread has read it
        time.sleep(0.001)
    assert (thread.is_alive(), ended) == (True, [])
    os.close(writing)
    thread.join()
    os.close(reading)
    assert (thread.is_alive(), ended) == (False, [1])


def test_seconds_of_a_step() -> None:
    def row(stage: str, step: int, seconds: float) -> dict[str, Any]:
        return {"stage": stage, "step": step, "seconds": seconds}

    # Search: its first epoch (which holds the scoring before it) is left out; the median of 1.0 and 2.0 and 1.2.
    rows = [row("search", 10, 50.0), row("search", 20, 60.0), row("search", 30, 80.0), row("search", 40, 92.0)]
    rows += [row("finetune", 50, 97.0)]
    found = seconds_per_step(rows)
    assert found == pytest.approx({"search": 1.2, "finetune": 0.5, "overall": (40 * 1.2 + 10 * 0.5) / 50})
    assert seconds_per_step([]) == {}
    assert seconds_per_step([row("search", 0, 1.0)]) == {}
