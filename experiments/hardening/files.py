"""Damaged files: 1,500 packed ones, 500 each of ONNX, NPZ and checkpoints, 200 programs; each is opened and counted.

    python -m experiments.hardening.files                          # all kinds; goes on where it stopped
    python -m experiments.hardening.files --kinds packed npz       # these
    python -m experiments.hardening.files --kinds npz --seed 17    # one trial with its traceback
    python -m experiments.hardening.files --anew                   # discards earlier counts

A file is changed by flipped, overwritten, inserted, removed, blanked or repeated bytes, cut short or made longer,
spliced with another model's file, given other lengths in its headers, other metadata, or other contents of a member
with a sound archive around it. Two in five packed files get their checksum anew, so that what is behind it is tried.

A packed file is opened by ``nipq.load``, a checkpoint as ``--resume`` does, an exported file by ``nipq.verify``. A file
that is accepted must give the same numbers as the undamaged one, bit for bit: the deployed model's state and outputs,
the outputs in ONNX Runtime, all arrays and facts, the outputs of the program, or the checkpoint's content.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, hardswish, relu

from experiments.hardening.trials import FAULT, REFUSED, RIGHT, SIGNED, Outcome, Trial, forget, parser, run
from nipq.config import Config
from nipq.export.api import export
from nipq.export.packed_read import load
from nipq.export.packed_write import NO_CHECKSUM, checksum, save
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.train.checkpoint import Checkpoint, Progress
from nipq.verify import archives, verify

#: Trials of each kind, and in a line of the results.
COUNTS = {"packed": (1500, 100), "onnx": (500, 50), "npz": (500, 100), "checkpoint": (500, 100), "program": (200, 20)}
ENDS = {"packed": ".nipq.safetensors", "onnx": ".onnx", "npz": ".npz", "checkpoint": ".pt", "program": ".pt2"}

#: Values that no field of a header or of metadata should have.
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", "../x", "\x00", "signed", [], [0],
    [-1], [2**40, 2**40], {}, {"x": 1}, [[[[]]]],
)  # fmt: skip


class Net(nn.Module):
    """A convolution with a batch norm, a depthwise one, h-swish (a zero point), a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.one = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Four class scores."""
        x = relu(self.norm(self.stem(x)))
        x = hardswish(self.one(x + self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def trained(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A prepared network after a few steps, bits frozen, with its data.

    Args:
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    model, images, labels = Net(), torch.randn(32, 2, 6, 6), torch.arange(32) % 4
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    prepare_(model, images, Config(granularity="channel"))
    calibrate_(model, [images])
    for number, quantizer in enumerate(quantizers(model)):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_((4, 6, 3, 5)[number % 4])
    return model.eval(), images, labels


def checkpoint_of(model: nn.Module, seed: int) -> Checkpoint:
    """A checkpoint as a search writes it, with an optimizer that has made a step.

    Args:
        model: whose state it holds.
        seed: of its numbers.
    """
    torch.manual_seed(seed)
    other = Net()
    optimizer = torch.optim.Adam(other.parameters(), 0.02)
    other(torch.randn(4, 2, 6, 6)).sum().backward()
    optimizer.step()
    progress = Progress("search", 2, 3, [1.5, 20.0, 64.0], 4, 123, {"float": {"test": {"accuracy": 91.25}}}, 12.5)
    session = {"steps": 123, "phase": "search", "price": torch.rand(2)}
    return Checkpoint(progress, model.state_dict(), [optimizer.state_dict()], None, session)


class Files:
    """The undamaged files, and those of another model for splices.

    Attributes:
        model: the trained model.
        batch: inputs and labels that files are verified with.
        data: bytes of each kind's file.
        others: bytes of the other model's.

    Args:
        folder: where they are written.
        kinds: which ones.
    """

    def __init__(self, folder: Path, kinds: Sequence[str]) -> None:
        self.model, images, labels = trained(0)
        self.batch = [(images[:4], labels[:4])]
        self.data: dict[str, bytes] = {}
        self.others: dict[str, bytes] = {}
        for seed, found in ((0, self.data), (1, self.others)):
            model = self.model if seed == 0 else trained(1)[0]
            deployed = convert(model)
            for kind in kinds:
                path = folder / f"{seed}{ENDS[kind]}"
                if kind == "packed":
                    save(deployed, path)
                elif kind == "checkpoint":
                    checkpoint_of(model, seed).save(path)
                else:
                    export(deployed, path, images[:4])
                found[kind] = path.read_bytes()


# ---------------------------------------------------------------------- changes


def bytes_changed(data: bytearray, other: bytes, draw: random.Random) -> None:
    """Change some bytes anywhere.

    Args:
        data: of the file.
        other: of another model's.
        draw: source of randomness.
    """
    place, length = draw.randrange(len(data)), draw.randint(1, 60)
    match draw.randrange(10):
        case 0 | 1:
            data[place] ^= 1 << draw.randrange(8)
        case 2:
            data[place] = draw.randrange(256)
        case 3:
            data[place:place] = draw.randbytes(length)
        case 4:
            del data[place : place + length]
        case 5:
            del data[place:]
        case 6:
            data += draw.randbytes(length)
        case 7:
            data[place : place + length] = bytes(len(data[place : place + length]))
        case 8:
            data[place:place] = data[draw.randrange(len(data)) :][:length]
        case 9:
            start, end = sorted(draw.randrange(min(len(data), len(other))) for _ in range(2))
            data[start:end] = other[start:end]


def lengths_changed(data: bytearray, draw: random.Random) -> None:
    """Let a number of four or eight bytes near the start, or in a header of an archive, say something else.

    Args:
        data: of the file.
        draw: source of randomness.
    """
    headers = [match.start() + 4 for match in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06)", data)] or [0]
    place = draw.choice(headers) + draw.randrange(44 if headers != [0] else 8)
    size = draw.choice([1, 2, 4, 8])
    value = draw.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, len(data), len(data) + 1, 2**40])
    data[place : place + size] = struct.pack("<Q", value)[:size]


def tree_changed(tree: Any, draw: random.Random) -> Any:  # noqa: ANN401 - JSON
    """A JSON tree with one entry replaced, removed, renamed or repeated.

    Args:
        tree: the tree; it is changed.
        draw: source of randomness.
    """
    inner = [key for key, value in tree.items() if isinstance(value, dict | list)] if isinstance(tree, dict) else []
    if isinstance(tree, dict) and tree and (draw.random() < 0.3 or not inner):
        key = draw.choice(list(tree))
        match draw.randrange(4):
            case 0:
                del tree[key]
            case 1:
                tree[f"{key}x"] = tree.pop(key)
            case 2:
                tree[draw.choice(["x", "", "stem", "../x", "0"])] = tree[key]
            case 3:
                tree[key] = draw.choice(ODD)
        return tree
    if isinstance(tree, dict) and tree:
        key = draw.choice(inner)
        tree[key] = tree_changed(tree[key], draw)
        return tree
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        place = draw.randrange(len(tree))
        tree[place] = tree_changed(tree[place], draw)
        return tree
    return draw.choice(ODD)


def packed_changed(data: bytes, draw: random.Random) -> bytes:
    """A packed file with other metadata or another header, its lengths kept sound.

    Args:
        data: of the file.
        draw: source of randomness.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if draw.random() < 0.7:
        about = json.loads(header["__metadata__"]["nipq"])
        if draw.random() < 0.2:  # a former version had no checksum: no way around the present one
            about["version"] = draw.choice([1, 1, 1, 0, 1.0, True, 2.0, 3, "2", None])
            if draw.random() < 0.5:
                place = draw.randrange(8 + length, len(data))
                data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        else:
            about = tree_changed(about, draw)
        header["__metadata__"]["nipq"] = json.dumps(about)
    else:
        header = tree_changed(header, draw)
    text = json.dumps(header).encode().ljust(length)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def member_changed(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """An archive with sound headers and checksums around one member that is changed, dropped, renamed or repeated.

    Args:
        data: of the file.
        other: of another model's.
        draw: source of randomness.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(io.BytesIO(other)) as foreign:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = draw.choice(list(entries))
        inner = next((n for n in foreign.namelist() if n.partition("/")[2] == name.partition("/")[2]), name)
        content = bytearray(entries[name])
        renamed = name
        match draw.randrange(6):
            case 0:
                del entries[name]
                renamed = ""
            case 1:
                renamed = draw.choice([f"{name}x", "../x", "/x", "x", name.upper()])
                del entries[name]
            case 2 if inner in foreign.namelist():
                content = bytearray(foreign.read(inner))
            case 3 if name.endswith(".json"):
                content = bytearray(json.dumps(tree_changed(json.loads(content), draw)).encode())
            case _:
                if content:
                    bytes_changed(content, content, draw)
        if renamed:
            entries[renamed] = bytes(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, value)
    return file.getvalue()


def graph_changed(data: bytes, draw: random.Random) -> bytes:
    """An ONNX file with one field of a message in it changed.

    Args:
        data: of the file.
        draw: source of randomness.
    """
    import onnx  # here, as only one kind needs it

    model = onnx.load_from_string(data)
    graph = model.graph
    match draw.randrange(8):
        case 0:
            del graph.node[draw.randrange(len(graph.node))]
        case 1:
            node = draw.choice(graph.node)
            node.op_type = draw.choice(["Relu", "Identity", "Loop", "If", "QuantizeLinear", "Nothing", ""])
        case 2:
            node = draw.choice([node for node in graph.node if node.input])
            node.input[draw.randrange(len(node.input))] = draw.choice([*(t.name for t in graph.initializer), "x", ""])
        case 3:
            tensor = draw.choice(graph.initializer)
            content = bytearray(tensor.raw_data) or bytearray(b"\0")
            bytes_changed(content, content, draw)
            tensor.raw_data = bytes(content)
        case 4:
            tensor = draw.choice(graph.initializer)
            tensor.dims[:] = draw.choice([[], [0], [-1], [2**40], [2**31, 2**31], [*tensor.dims, 1], [7]])
        case 5:
            tensor = draw.choice(graph.initializer)
            tensor.data_type = draw.choice([0, 1, 2, 3, 7, 8, 10, 11, 21, 22, 25, 99])
        case 6:
            entry = draw.choice(model.metadata_props)
            try:
                entry.value = json.dumps(tree_changed(json.loads(entry.value), draw))
            except ValueError:
                entry.value = str(draw.choice(ODD))
        case 7:
            owner = draw.choice([node for node in graph.node if node.attribute])
            attribute = draw.choice(owner.attribute)
            attribute.i, attribute.f = draw.choice([-1, 0, 7, 2**40]), draw.choice([-1.0, float("nan")])
            attribute.ints[:] = draw.choice([[], [0], [2**40], [-1, -1]])
    return bytes(model.SerializeToString())


def changed(kind: str, files: Files, seed: int) -> tuple[bytes, bool]:
    """A damaged file, and whether it got a checksum anew.

    Args:
        kind: of the file.
        files: the undamaged ones.
        seed: of the change.
    """
    draw, data, other = random.Random(seed), files.data[kind], files.others[kind]
    signed = False
    structured = draw.random() < 0.5
    if structured and kind == "packed":
        data = packed_changed(data, draw)
        signed = draw.random() < 0.8
    elif structured and kind == "onnx":
        data = graph_changed(data, draw)
    elif structured:
        data = member_changed(data, other, draw)
    else:
        content = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 6])):
            if content and draw.random() < 0.2:
                lengths_changed(content, draw)
            elif content:
                bytes_changed(content, other, draw)
        data = bytes(content)
    return (signed_anew(data), True) if signed else (data, False)


def signed_anew(data: bytes) -> bytes:
    """A packed file whose checksum is right again, if it states one."""
    stated = re.search(rb'sha256\\": ?\\"([0-9a-f]{64})', data)
    if stated is None:
        return data
    place = stated.start(1)
    blank = data[:place] + NO_CHECKSUM.encode() + data[place + len(NO_CHECKSUM) :]
    return blank[:place] + checksum(blank, place).encode() + blank[place + len(NO_CHECKSUM) :]


# ---------------------------------------------------------------------- openings


def same(a: Any, b: Any) -> bool:  # noqa: ANN401 - trees of tensors
    """Return whether two trees are equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def loaded(files: Files, path: Path) -> Any:  # noqa: ANN401 - a tree
    """State, bits and outputs of a packed file's model."""
    model = load(path, Net())
    facts = {name: repr(module) for name, module in model.named_modules()}
    return [dict(model.state_dict()), facts, model(files.batch[0][0])]


def checkpoint(_files: Files, path: Path) -> Any:  # noqa: ANN401 - a tree
    """All that a checkpoint holds."""
    found = Checkpoint.load(path)
    return [asdict(found.progress), dict(found.model), found.optimizers, found.average, found.session]


def graph_outputs(files: Files, path: Path) -> Any:  # noqa: ANN401 - a tree
    """Outputs of an ONNX file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: files.batch[0][0].numpy()})
    return [torch.from_numpy(np.ascontiguousarray(output)) for output in outputs]


def arrays(_files: Files, path: Path) -> Any:  # noqa: ANN401 - a tree
    """Arrays and facts of an NPZ file."""
    with np.load(path) as file:
        return {key: _plain(file[key]) for key in file}


def _plain(value: np.ndarray) -> Any:  # noqa: ANN401 - bytes or a tensor
    return value if isinstance(value, bytes) else (value.dtype.str, list(value.shape), value.tobytes())


def program_outputs(files: Files, path: Path) -> Any:  # noqa: ANN401 - a tree
    """Outputs of a program."""
    return torch.export.load(path).module()(files.batch[0][0])


#: What is compared of a file that is accepted.
CONTENTS: dict[str, Callable[[Files, Path], Any]] = {
    "packed": loaded, "checkpoint": checkpoint, "onnx": graph_outputs, "npz": arrays, "program": program_outputs,
}  # fmt: skip


def trial_of(kind: str, files: Files, folder: Path) -> Trial:
    """A trial of one kind of file.

    Args:
        kind: of the file.
        files: the undamaged ones.
        folder: for the damaged one.
    """
    path = folder / f"damaged{ENDS[kind]}"
    path.write_bytes(files.data[kind])
    content = partial(CONTENTS[kind], files, path)
    expected = content()
    if kind not in ("packed", "checkpoint"):
        assert verify(files.model, path, loader=files.batch), "the undamaged file is not verified"

    def trial(seed: int) -> Outcome:
        data, signed = changed(kind, files, seed)
        path.write_bytes(data)
        if kind not in ("packed", "checkpoint"):
            outcome = verify(files.model, path, loader=files.batch)
            if not outcome:
                return (REFUSED, "") if outcome.first_difference else (FAULT, "fails without a first difference")
        if same(content(), expected):
            return RIGHT, ""
        return (SIGNED, "") if signed else (FAULT, "accepted, and its numbers are others")

    return trial


def main() -> None:
    """Run the kinds that are asked for."""
    arguments = parser(__doc__, list(COUNTS)).parse_args()
    if arguments.anew:
        forget(arguments.kinds)
    with tempfile.TemporaryDirectory() as name:
        files = Files(Path(name), arguments.kinds)
        for kind in arguments.kinds:
            trial = trial_of(kind, files, Path(name))
            if kind == "program":  # the promised program is exported once, not for every file
                promised = archives.program_bytes(convert(files.model), files.batch[0][0])
                archives.program_bytes = lambda *_, promised=promised: promised
            if arguments.seed is not None:
                print(trial(arguments.seed))
            else:
                print(f"{kind}: {dict(run(kind, trial, *COUNTS[kind]))}")


if __name__ == "__main__":
    main()
