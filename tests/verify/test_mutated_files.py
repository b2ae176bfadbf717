"""Damaged and hostile exported files: a check that fails or nothing that matters; never a crash, never anything run."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nipq.errors import FileFormatError
from nipq.verify import verify
from nipq.verify.archives import members

onnx = pytest.importorskip("onnx")

Exported = dict[str, Path]
FORMATS = (".onnx", ".qonnx.onnx", ".npz", ".pt2")


def mutate(data: bytearray, draw: random.Random) -> None:
    """Flip, overwrite, insert, remove, cut, append, blank or repeat some bytes."""
    place, length = draw.randrange(len(data)), draw.randint(1, 60)
    kind = draw.randrange(8)
    if kind == 0:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[place] = draw.randrange(256)
    elif kind == 2:
        data[place:place] = draw.randbytes(length)
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        del data[place:]
    elif kind == 5:
        data += draw.randbytes(length)
    elif kind == 6:
        data[place : place + length] = bytes(len(data[place : place + length]))
    else:
        data[place:place] = data[draw.randrange(len(data)) :][:length]


def check(trained: Any, source: Path, folder: Path, seeds: range) -> None:
    model, data = trained
    batch = [(data[0][0][:2], data[0][1][:2])]
    path = folder / source.name
    original, refused = source.read_bytes(), 0
    for seed in seeds:
        draw = random.Random(seed)
        changed = bytearray(original)
        for _ in range(draw.choice([1, 1, 1, 6])):
            if changed:
                mutate(changed, draw)
        path.write_bytes(changed)
        refused += not verify(model, path, loader=batch)
        assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert refused > len(seeds) // 2


@pytest.mark.parametrize("end", FORMATS)
def test_mutated_files(trained: Any, exported: Exported, tmp_path: Path, end: str) -> None:
    check(trained, exported[end], tmp_path, range(3 if end == ".pt2" else 30))


@pytest.mark.slow
@pytest.mark.parametrize("end", FORMATS)
def test_more_mutated_files(trained: Any, exported: Exported, tmp_path: Path, end: str) -> None:
    check(trained, exported[end], tmp_path, range(1000, 1050 if end == ".pt2" else 1300))


# ---------------------------------------------------------------------- hostile on purpose


def refusal(trained: Any, path: Path) -> str:
    """Why a file cannot be read."""
    model, data = trained
    result = verify(model, path, loader=[data[0][0][:2]])
    assert [(check.claim, check.passed) for check in result.checks] == [("the file can be read", False)], str(result)
    return str(result.first_difference)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "model.bin", "a/../../secret"])
def test_tensors_outside_the_file_are_not_opened(
    trained: Any, exported: Exported, tmp_path: Path, location: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path / "secret", folder / "model.bin"):
        place.write_bytes(bytes(72))
    model, path = onnx.load(exported[".onnx"]), folder / "model.onnx"
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "depthwise.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    assert f"expected a tensor inside the file, found one in ['{location}']" in refusal(trained, path)
    tensor.data_location = 0  # said in one place only
    path.write_bytes(model.SerializeToString())
    assert "expected a tensor inside the file" in refusal(trained, path)


def loop(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["ever"], body=inner))


def foreign_operator(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Run", ["x"], ["y"], domain="com.example"))


def function(model: Any) -> None:
    model.functions.append(onnx.helper.make_function("com.example", "Run", [], [], [], []))


def hidden(model: Any) -> None:
    tensor = onnx.helper.make_tensor("t", 1, [1], [1.0])
    tensor.external_data.add(key="location", value="../secret")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (loop, "expected operators without graphs inside, found a Loop"),
        (foreign_operator, "expected operators of ONNX alone, found com.example.Run"),
        (function, "expected no functions of its own, found 1"),
        (hidden, "expected a tensor inside the file"),
        (lambda model: model.metadata_props.pop(), "expected an ONNX file that nipq.export wrote"),
        (lambda model: setattr(model.metadata_props[0], "value", "[" * 9999), "metadata: expected JSON"),
        (lambda model: setattr(model.metadata_props[0], "value", "{}"), "metadata: expected format: Field required"),
    ],
)
def test_a_graph_that_could_do_more_than_compute_is_refused(
    trained: Any, exported: Exported, tmp_path: Path, plant: Any, message: str
) -> None:
    model, path = onnx.load(exported[".onnx"]), tmp_path / "model.onnx"
    plant(model)
    path.write_bytes(model.SerializeToString())
    assert message in refusal(trained, path)


@pytest.mark.parametrize("end", FORMATS)
def test_what_is_missing_or_far_too_long_is_refused_unread(trained: Any, tmp_path: Path, end: str) -> None:
    path = tmp_path / f"model{end}"
    assert "found none" in refusal(trained, path)
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "bytes, found" in refusal(trained, path)


class Bomb:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


#: Places of the ends of an archive as torch writes it: of ZIP64 but for the versions, of its locator, the plain one.
ENDS = [*range(-98, -94), *range(-82, -22), *range(-22, 0)]


def test_an_archive_that_two_readers_would_read_differently_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Torch reads the end of ZIP64, Python the plain one; stored lengths and numbers of volumes it does not need."""
    whole, path = exported[".pt2"].read_bytes(), tmp_path / "model.pt2"
    assert whole[-98:-94] == b"PK\x06\x06"
    assert members(whole, path)
    entry = whole.find(b"PK\x01\x02")
    for place in (*ENDS, entry + 20, entry + 22, entry + 34):
        data = bytearray(whole)
        data[place] ^= 1
        with pytest.raises(FileFormatError, match=r"whole archive|compressed or overlapping"):
            members(bytes(data), path)
    with pytest.raises(FileFormatError, match="whole archive"):
        members(whole + b"x", path)


@pytest.mark.parametrize("end", FORMATS)
def test_pickles_are_never_run(trained: Any, exported: Exported, tmp_path: Path, end: str) -> None:
    model, data = trained
    mark, path = tmp_path / "ran", tmp_path / f"model{end}"
    bomb = pickle.dumps(Bomb(mark))
    path.write_bytes(bomb)
    refusal(trained, path)
    torch.save(Bomb(mark), path)
    assert not verify(model, path, loader=data)
    if end in (".npz", ".pt2"):
        with zipfile.ZipFile(exported[end]) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                head = (
                    b"\x93NUMPY\x01\x00v\x00"
                    + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117)
                    + b"\n"
                )
                target.writestr(entry.filename, head + bomb if entry.filename.endswith(".npy") else source.read(entry))
            target.writestr("model/data/weights/model.pt", bomb)  # what torch would load as it did in former days
        assert not verify(model, path, loader=data)
    assert not mark.exists()


def test_archives_hold_no_more_than_they_are_long(tmp_path: Path) -> None:
    """No bombs, no two members of one name, and nothing is written anywhere."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside", bytes(10**7))
    with pytest.raises(ValueError, match="found a compressed or overlapping one"):
        members(file.getvalue(), tmp_path / "model.npz")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("same", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("same", b"2")
    with pytest.raises(ValueError, match="expected every name once"):
        members(file.getvalue(), tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())
