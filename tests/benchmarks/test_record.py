from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record


def test_a_result_file_is_not_replaced_untold(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.jsonl"
    record.refuse_existing(path, overwrite=False)
    record.write(path, {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["found.jsonl"]
    with pytest.raises(SystemExit, match=r"found\.jsonl: expected no such result file, found one\. Give --overwrite"):
        record.refuse_existing(path, overwrite=False)
    record.refuse_existing(path, overwrite=True)


def test_the_origin_says_what_numbers_depend_on_and_no_path() -> None:
    found = record.origin((0.5, 0.25, 0.1))
    assert found["versions"].keys() >= {"nipq", "python", "torch"}
    assert found["machine"]["load_before"] == [0.5, 0.25, 0.1]
    assert str(record.ROOT) not in json.dumps(found)


def test_committed_results_have_an_origin() -> None:
    paths = list(record.RESULTS.glob("*.jsonl"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content.keys() >= {"machine", "versions", "revision", "command", "rounds"}
        assert str(content["command"]).startswith("python -m benchmarks.")
