from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiments.tune
from experiments.rivals.page import candidates
from experiments.tune import Tuning
from nipq.train.config import check_config

HERE = Path(experiments.tune.__file__).parent
FILES = sorted(HERE.glob("*/*candidates.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_candidate_is_a_valid_run_from_the_same_float_start(file: Path, tmp_path: Path) -> None:
    first, *others = Tuning(file, tmp_path, tmp_path).configs().items()
    assert (first[0], check_config(first[1]).budget) == ("float", None)
    for _, config in others:
        checked = check_config(config)
        assert checked.model.weights == str(tmp_path / "float" / "float.pt")
        assert checked.budget is not None
        assert checked.data.validation > 0
        assert checked.stages.float.epochs == 0


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_record_is_that_of_its_candidate_and_holds_no_test_score(file: Path, tmp_path: Path) -> None:
    tuning = Tuning(file, tmp_path, tmp_path)
    for name, record in tuning.results.read().items():
        assert record["fields"] == tuning.fields(name)
        assert record.keys() == {"name", "method", "fields", "validation", "average_bits", "seconds"}


def test_the_table_judges_a_candidate_by_the_state_in_which_it_ends(tmp_path: Path) -> None:
    scores = {"float": 90.0, "frozen": 70.0, "finetuned": 80.0}
    ends = {"float-0": ("float", "frozen"), "lsq-0": ("float", "frozen"), "nipq-0": ("float", "frozen", "finetuned")}
    lines = []
    for name, states in ends.items():
        validation = {state: {"loss": 1.0, "accuracy": scores[state], "count": 1} for state in states}
        lines.append({"name": name, "method": name.removesuffix("-0"), "fields": {}, "validation": validation})
    path = tmp_path / "tuning.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in candidates(path).splitlines()[2:]]
    assert rows == [["float", "", "90.00"], ["lsq", "", "70.00"], ["nipq", "", "80.00"]]
