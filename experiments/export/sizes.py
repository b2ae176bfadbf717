"""Bytes of every file format beside the sum of N * b / 8 over the weights.

    python -m experiments.export.sizes --run RUN     # a finished run of nipq demo; without it the two random networks

A trained model of the digits, ResNet-18 and MobileNet-v2 with random weights and bits of 2 to 8. Nothing is downloaded.
Needs torchvision and the extra `onnx`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from torch import Tensor, nn

import nipq
from experiments.export.random_nets import built, random_network
from experiments.export.records import origin, parser, stored, write
from experiments.shown import Record
from nipq.export.packed_write import file_bytes
from nipq.functional.packing import payload_bytes
from nipq.nn.deployed import deployed_layers
from nipq.train.batches import pick
from nipq.train.data import load_data
from nipq.train.factory import build_model
from nipq.train.run_folder import RunFolder

SEED, SIZE = 0, 64
NETWORKS = ("resnet18", "mobilenet_v2")
COMMAND = "python -m experiments.export.sizes"
#: Files by what they are called in the table; the name decides the format.
FILES = {
    "ONNX with `--pack`": "packed.onnx",
    "ONNX": "model.onnx",
    "arrays": "model.npz",
    "`torch.export` program": "model.pt2",
    "QONNX": "model.qonnx.onnx",
}


def sizes(deployed: nn.Module, example: Tensor, folder: Path) -> Record:
    """Bytes by format.

    Args:
        deployed: a deployed model.
        example: what it is called with.
        folder: for the files.
    """
    owners = [layer for layer in deployed_layers(deployed).values() if layer.tied_to is None]
    packed = nipq.save(deployed, folder / "model.nipq.safetensors").read_bytes()
    header = 8 + int.from_bytes(packed[:8], "little")
    planes = sum(payload_bytes(layer.weight.numel(), layer.weight_bits) for layer in owners)
    found = {"packed file of `nipq.save`": len(packed)}
    for name, file in FILES.items():
        found[name] = nipq.export(deployed, folder / file, example, pack=file.startswith("packed")).bytes
    return {
        "layers": len(owners),
        "weights": sum(layer.weight.numel() for layer in owners),
        "payload": sum(layer.weight.numel() * layer.weight_bits for layer in owners) / 8,
        "header": header,
        "scales": len(packed) - header - planes,
        "promised": file_bytes(deployed),
        "files": found,
    }


def measure(name: str, run: Path | None) -> Record:
    """One model.

    Args:
        name: of a network, or ``digits``.
        run: a finished run, for the digits.
    """
    started = time.perf_counter()
    if run is not None:
        config = RunFolder(run).read_config()
        deployed = nipq.load(RunFolder(run).model, build_model(config.model, with_weights=False))
        floats = build_model(config.model, with_weights=False).state_dict()
        example = pick(next(iter(load_data(config.data, config.seed).test))[0], slice(2))
    else:
        floats = built(name, SIZE).state_dict()
        model, example = random_network(name, SIZE, SEED, count=2)
        deployed = nipq.convert(model)
    facts: Record = {"name": name, "seed": SEED if run is None else config.seed}
    facts["float32"] = sum(4 * value.numel() for value in floats.values() if value.is_floating_point())
    with tempfile.TemporaryDirectory() as folder:
        facts |= sizes(deployed, example, Path(folder))
    command = COMMAND if run is None else f"{COMMAND} --run RUN"
    return facts | origin(command, time.perf_counter() - started)


def main() -> int:
    """Measure."""
    options = parser(__doc__, "sizes", 300)
    options.add_argument("--run", type=Path, help="a finished run of nipq demo")
    given = options.parse_args()
    done = stored(given.out).read()
    for name in (*NETWORKS, *(["digits"] if given.run else [])):
        if given.overwrite or name not in done:
            write(given.out, name, measure(name, given.run if name == "digits" else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
