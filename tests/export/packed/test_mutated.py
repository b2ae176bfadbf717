"""Damaged and malicious packed files: the library's own error, or the very model that was saved; nothing else."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from nipq.errors import FileFormatError
from nipq.export.packed_read import HEADER_BASE, load
from nipq.export.packed_write import NO_CHECKSUM, save, with_checksum
from nipq.prepare.convert import convert

# ---------------------------------------------------------------------- bytes


def flip_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def other_byte(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] = draw.randrange(256)


def header_byte(data: bytearray, draw: random.Random) -> None:
    end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    data[draw.randrange(end)] = draw.choice(b'09aZ{}[]",:\\ \x00\xff')


def insert(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    data[place:place] = draw.randbytes(draw.randint(1, 40))


def remove(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    del data[place : place + draw.randint(1, 40)]


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def append(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randint(1, 4000))


def blank(data: bytearray, draw: random.Random) -> None:
    place, length = draw.randrange(len(data)), draw.randint(1, 400)
    data[place : place + length] = bytes(len(data[place : place + length]))


def repeat(data: bytearray, draw: random.Random) -> None:
    place, target = draw.randrange(len(data)), draw.randrange(len(data))
    data[target:target] = data[place : place + draw.randint(1, 400)]


def header_length(data: bytearray, draw: random.Random) -> None:
    data[:8] = struct.pack("<Q", draw.choice([0, 1, draw.randrange(len(data)), HEADER_BASE, 2**31, 2**40, 2**64 - 1]))


BYTES = (flip_bit, other_byte, header_byte, insert, remove, cut, append, blank, repeat, header_length)

# ---------------------------------------------------------------------- what the file says, with a right checksum

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 2, 17, 2**70, 1.5, float("nan"), "", "stem", "norm", "../../x", "\x00", [], {}, [[]], [-1]),
    {"a": 1},
    "x" * 3000,
)


def say_otherwise(tensors: dict[str, Any], record: dict[str, Any], draw: random.Random) -> None:
    """Replace, drop or add one field somewhere in the JSON."""
    place = record
    while True:
        key = draw.choice(list(place))
        inner = place[key]
        if not isinstance(inner, dict) or not inner or draw.random() < 0.2:
            break
        place = inner
    what = draw.random()
    if what < 0.6:
        place[key] = draw.choice(JUNK)
    elif what < 0.8:
        del place[key]
    else:
        place[draw.choice(["bits", "tied_to", "batchnorm", "head", "extra"])] = draw.choice(JUNK)


def other_tensor(tensors: dict[str, Any], record: dict[str, Any], draw: random.Random) -> None:
    """Another type, shape or name, or none at all."""
    key = draw.choice(list(tensors))
    value = tensors[key]
    change = draw.randrange(5)
    if change == 0:
        tensors[key] = value.to(draw.choice([torch.float64, torch.int16, torch.float16, torch.bool, torch.uint8]))
    elif change == 1:
        tensors[key] = value.reshape(-1)[:-1].clone()
    elif change == 2:
        tensors[key] = value[None].clone()
    elif change == 3:
        tensors[draw.choice(["", "../x", "head.planes", "a" * 500])] = tensors.pop(key)
    else:
        tensors[key] = torch.empty(0)


RECORDS = (say_otherwise, other_tensor)


def outcome(path: Path, build: Callable[[], nn.Module]) -> dict[str, Any] | None:
    """State of what is loaded, None if it is refused; any other error fails the test."""
    try:
        return dict(load(path, build()).state_dict())
    except FileFormatError:
        return None


def check(mixed: Any, folder: Path, seeds: range) -> None:
    path = folder / "model"
    deployed = convert(mixed.model)
    original = save(deployed, path).read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        text = file.metadata()["nipq"]
    expected = deployed.state_dict()
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        mutation = draw.choice((*BYTES, *RECORDS))
        if mutation in RECORDS:
            changed, record = dict(tensors), json.loads(text)
            mutation(changed, record, draw)
            data = to_bytes(changed, {"nipq": json.dumps(record | {"sha256": NO_CHECKSUM})})
            path.write_bytes(with_checksum(data))
        else:
            changed_bytes = bytearray(original)
            for _ in range(draw.choice([1, 1, 1, 5])):
                if changed_bytes:
                    mutation(changed_bytes, draw)
            path.write_bytes(changed_bytes)
        state = outcome(path, mixed.build)
        refused += state is None
        if state is not None and mutation not in RECORDS:  # the mutation hit nothing
            assert state.keys() == expected.keys(), seed
            assert all(torch.equal(state[key], expected[key]) for key in expected), seed
    assert refused > 0.9 * len(seeds)
    assert [entry.name for entry in folder.iterdir()] == ["model"]
    assert len(list(folder.parent.iterdir())) == 1


def test_150_mutated_files(mixed: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    check(mixed, tmp_path / "folder", range(150))


@pytest.mark.slow
def test_1000_mutated_files(mixed: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    check(mixed, tmp_path / "folder", range(1000, 2000))


def test_any_flipped_bit_of_any_byte_is_noticed(mixed: Any, tmp_path: Path) -> None:
    """The checksum covers the whole file, the release that wrote it and the padding included."""
    path = save(convert(mixed.model), tmp_path / "model")
    original = path.read_bytes()
    for place in random.Random(0).sample(range(len(original)), 100):
        data = bytearray(original)
        data[place] ^= 1
        path.write_bytes(data)
        assert outcome(path, mixed.build) is None, place


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_no_version_switches_the_checksum_off(mixed: Any, tmp_path: Path, version: int) -> None:
    path = save(convert(mixed.model), tmp_path / "model")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["nipq"])
    del record["sha256"]
    path.write_bytes(to_bytes(tensors, {"nipq": json.dumps(record | {"version": version})}))
    assert outcome(path, mixed.build) is None


# ---------------------------------------------------------------------- hostile on purpose


class Bomb:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_torch", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, as_torch: bool) -> None:
    path, mark = tmp_path / "model.nipq.safetensors", tmp_path / "ran"
    if as_torch:
        torch.save(Bomb(mark), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(FileFormatError, match="expected a whole safetensors file"):
        load(path, nn.Linear(2, 2))
    assert not mark.exists()


def test_a_file_longer_than_any_of_its_model_is_not_read(mixed: Any, tmp_path: Path) -> None:
    """A terabyte of nothing after a sound start: refused by its length, in no time and memory."""
    path = save(convert(mixed.model), tmp_path / "model")
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match=r"expected at most .* bytes for this Mixed, found more"):
        load(path, mixed.build())


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a":' * 10_000, "9" * 60_000, '"' + "\\u0041" * 9_000])
def test_json_made_to_hang_or_overflow_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model"
    for header in (text, json.dumps({"__metadata__": {"nipq": text}})):
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        with pytest.raises(FileFormatError):
            load(path, nn.Linear(2, 2))


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"nipq": json.dumps({"format": "nipq-packed", "version": 3, "layers": {}})},
        "weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    }
    data = json.dumps(header).encode()
    (tmp_path / "model").write_bytes(struct.pack("<Q", len(data)) + data + bytes(64))
    with pytest.raises(FileFormatError, match="expected a whole safetensors file"):
        load(tmp_path / "model", nn.Linear(2, 2))
