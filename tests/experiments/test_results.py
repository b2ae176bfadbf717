"""Committed results are well formed, belong to their grids, and are what the documents show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments import write_results
from experiments.export.records import PATH
from experiments.rivals.page import records_of
from experiments.shown import PICTURES, ROOT, lines_of
from nipq.train.compare import CompareFolder, expand, load_grid
from nipq.train.config import check_config
from nipq.train.run_folder import FREE_FIELDS, flat

FILES = sorted((ROOT / "experiments").rglob("results*/*.jsonl")) + sorted((ROOT / "experiments").glob("*/*.jsonl"))
GRIDS = [path.parents[1] / f"{path.stem}.yaml" for path in FILES]
GRIDS = [path for path in GRIDS if path.is_file() and "candidates" not in path.stem]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_every_line_is_a_record_without_a_path(path: Path) -> None:
    records = lines_of(path)
    assert records
    for record in records:
        assert isinstance(record, dict)
        assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(record))
        if "command" in record:
            assert not PATH.search(re.sub(r"RUNS/[\w.+-]+", "", record["command"]))
        if "tuning" not in path.name:
            assert record["versions"].keys() >= {"python", "nipq", "torch"}
            assert {"processor", "cores"} <= record["machine"].keys()


@pytest.mark.parametrize("path", GRIDS, ids=shown)
def test_every_record_is_a_cell_of_its_grid_as_the_grid_says_it(path: Path, tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in expand(load_grid(path))}
    folder = CompareFolder(tmp_path)
    for name, record in records_of(path).items():
        cell = cells[name]
        assert record["cell"] == cell.to_dict()
        now, then = flat(folder.portable(check_config(cell.config))), flat(record["config"])
        changed = {key for key in now.keys() & then.keys() if now[key] != then[key]}  # the library has new fields since
        assert changed <= {*FREE_FIELDS, ("verify_batches",)}, name
        assert "test" in list(record["results"]["states"].values())[-1]


def test_the_documents_show_the_committed_results() -> None:
    for path in write_results.pages():
        text = path.read_text(encoding="utf-8")
        assert write_results.filled(path, text) == text, f"{shown(path)}: run python experiments/write_results.py"


def test_the_list_of_blocks_is_complete() -> None:
    listed = (write_results.__doc__ or "").split("what they show:")[1]
    known = {word for word in re.findall(r"[a-z][\w-]+", listed) if word in write_results.BLOCKS}
    assert known == write_results.BLOCKS.keys()


def test_blocks_are_filled_and_pictures_linked_from_any_folder() -> None:
    text = "# Page\n<!-- results:sensitivity:begin -->\nold\n<!-- results:sensitivity:end -->\nrest\n"
    for folder, way in ((ROOT / "docs" / "results", "pictures"), (ROOT, "docs/results/pictures")):
        found = write_results.filled(folder / "page.md", text)
        assert "old" not in found
        assert found.startswith("# Page\n<!-- results:sensitivity:begin -->\n| network |")
        assert found.endswith("<!-- results:sensitivity:end -->\nrest\n")
        (link,) = re.findall(r"\]\((.*)\)", found)
        assert link == f"{way}/sensitivity_bits.png"
        assert (folder / link).is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results:no-such:begin -->\n<!-- results:no-such:end -->\n", "a known block, found results:no-such"),
        ("<!-- results:digits:begin -->\n", "a begin and an end of results:digits"),
        ("<!-- results:digits:begin -->\n<!-- results:tasks-summary:end -->\n", "a begin and an end of results:digits"),
    ],
)
def test_markers_that_cannot_be_meant_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_results.filled(ROOT / "docs" / "page.md", text)


def test_every_picture_is_shown_and_there() -> None:
    texts = [write_results.block(name) for name in write_results.BLOCKS]
    texts += [path.read_text(encoding="utf-8") for path in write_results.pages()]
    linked = {name for text in texts for name in re.findall(r"pictures/([\w.-]+\.png)", text)}
    assert linked == {path.name for path in PICTURES.glob("*.png")}
