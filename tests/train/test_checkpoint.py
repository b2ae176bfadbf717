"""Checkpoints: whole or not at all, and nothing that is stored in a file is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nipq.errors import FileFormatError
from nipq.files import seal
from nipq.train.checkpoint import FORMAT, VERSION, Checkpoint, Progress, _filled

WHOLE = {
    "format": FORMAT,
    "version": VERSION,
    "progress": {},
    "model": {},
    "optimizers": None,
    "average": None,
    "session": None,
}


@pytest.fixture
def checkpoint() -> Checkpoint:
    progress = Progress("search", epoch=2, step=3, sums=[1.5, 2.0, 3.0], states={"float": {"test": {"accuracy": 98.0}}})
    return Checkpoint(progress, {"weight": torch.randn(3)}, optimizers=[{"state": {0: {"m": torch.ones(2)}}}])


def test_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path)
    again = Checkpoint.load(path)
    assert again.progress == checkpoint.progress
    assert torch.equal(again.model["weight"], checkpoint.model["weight"])
    assert again.optimizers is not None
    assert torch.equal(again.optimizers[0]["state"][0]["m"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_failed_save_keeps_the_old_one(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path)

    def half(_content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path)
    assert Checkpoint.load(path).progress == checkpoint.progress


def test_cut_off_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FileFormatError, match="its checksum is missing or another one"):
        Checkpoint.load(path)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "version": VERSION, "model": Trap()}, tmp_path / "checkpoint.pt")
    seal(tmp_path / "checkpoint.pt")
    with pytest.raises(FileFormatError, match="could not read it"):
        Checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "trap-was-sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "found something else"),
        ([1, 2], "found something else"),
        ({"format": FORMAT, "version": 99}, f"expected checkpoint version {VERSION} in .*, found 99"),
        ({"format": FORMAT, "version": VERSION, "progress": {}}, "lacks entries"),
        ({**WHOLE, "shards": "../elsewhere"}, "the name of the folder of its shards, found '../elsewhere'"),
    ],
    ids=["state_dict", "list", "version", "incomplete", "shards elsewhere"],
)
def test_foreign_file(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    seal(tmp_path / "checkpoint.pt")
    with pytest.raises(FileFormatError, match=message):
        Checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_parameter_called_shard_is_no_shard() -> None:
    model = {"shard": torch.ones(1), "weight": {"shard": "model/weight", "shape": [2], "dtype": "float32"}}
    assert _filled(model, lambda entry: entry["shard"]) == {**model, "weight": "model/weight"}


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_noticed(checkpoint: Checkpoint, place: float, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="its checksum is missing or another one"):
        Checkpoint.load(path)
