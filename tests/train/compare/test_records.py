"""One JSON-lines file of records: nothing is lost, doubled or replaced untold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nipq.errors import ConfigError, FileFormatError
from nipq.files import locked
from nipq.train.records import Record, Records


def name_of(record: Record) -> str:
    return str(record["name"])


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "found.jsonl", name_of)


def test_records_come_back_in_their_order(records: Records) -> None:
    assert records.read() == {}
    written = [{"name": "b", "value": 0.1}, {"name": "a", "text": "a line\u2028in \u00fc\n"}]
    for record in written:
        records.append(record)
    assert list(records.read().values()) == written
    assert len(records.path.read_text(encoding="utf-8").split("\n")) == 3, "a line each, the last one ended"
    records.discard(["a", "unknown"])
    assert list(records.read()) == ["b"]
    records.discard(["b"])
    assert records.read() == {}


def test_a_record_is_replaced_only_when_told(records: Records) -> None:
    records.append({"name": "a", "value": 1})
    with pytest.raises(ConfigError, match="expected no record of 'a', found one"):
        records.append({"name": "a", "value": 2})
    assert records.read()["a"]["value"] == 1
    records.append({"name": "b"})
    records.append({"name": "a", "value": 2}, replace=True)
    assert list(records.read().values()) == [{"name": "a", "value": 2}, {"name": "b"}], "at its old place"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a"}\n{"name": "b"', "line 2: expected a record, found something else"),
        ('{"name": "a"}\n\n', "line 2: expected a record"),
        ("[1]\n", "line 1: expected a record"),
        ('{"value": 1}\n', "line 1: expected a record.*KeyError"),
        ('{"name": "a"}\n{"name": "a"}\n', "line 2: expected one record of each name, found a second 'a'"),
    ],
    ids=["cut", "empty", "list", "nameless", "twice"],
)
def test_a_file_that_cannot_be_meant_is_refused_and_left_alone(text: str, message: str, records: Records) -> None:
    records.path.write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError, match=message):
        records.read()
    with pytest.raises(FileFormatError, match=message):
        records.append({"name": "c"})
    assert records.path.read_text(encoding="utf-8") == text


def test_writers_at_the_same_time_lose_nothing(records: Records) -> None:
    # A lock belongs to an open file, so threads exclude each other as processes do.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: Records(records.path, name_of).append({"name": str(n)}), range(40)))
    assert sorted(map(int, records.read())) == list(range(40))


def test_an_error_while_writing_leaves_the_old_file(records: Records) -> None:
    records.append({"name": "a"})
    before = records.path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.append({"name": "b", "value": object()})
    assert records.path.read_bytes() == before
    assert json.loads(before) == {"name": "a"}


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "it"),
        pytest.raises(ConfigError, match=r"only process that trains x, found process \d+ on"),
        locked(tmp_path / "it", alone="trains x"),
    ):
        pass
    with locked(tmp_path / "it", alone="trains x"):
        pass
