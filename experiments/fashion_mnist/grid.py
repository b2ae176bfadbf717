"""Two networks, three budgets, several seeds on Fashion-MNIST, in resumable cells.

    python experiments/fashion_mnist/grid.py --data FOLDER --runs RUNS            # everything that is not done yet
    python experiments/fashion_mnist/grid.py --data FOLDER --runs RUNS --workers 2

A cell is one run of ``nipq.train``: first a float cell for each network and seed, then one cell for each budget, all
from that float cell's weights, which also teach it (self-distillation). Its result is one line of ``results.jsonl``; a
cell that has its line is skipped, and a killed one continues from its checkpoint. Hyper-parameters were chosen
on validation images of seed 0; the test split is read once for each named state of a cell, at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nipq.train.records import Records, processor

RESULTS = Records(Path(__file__).parent / "results.jsonl")

NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {
        "factory": "nipq.train.models:mobilenet_v2_28",
        "kwargs": {
            "width_mult": 0.35,
            "stem_stride": 2,
            "head": 256,
            "stages": [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2], [6, 96, 1, 1]],
        },
    },
    "resnet18": {"factory": "nipq.train.models:resnet18_28", "kwargs": {"width": 16, "stem_stride": 2}},
}
BUDGETS = (4.0, 3.0, 2.5)
SEEDS = (0, 1, 2)

#: Epochs of float training, search and fine-tuning.
EPOCHS = {"mobilenet_v2": (6, 4, 1), "resnet18": (5, 2, 1)}


def float_config(network: str, seed: int, data: Path) -> dict[str, Any]:
    """Float training, then nothing but rounding to 8 bits: the start of every other cell, and a sanity row."""
    epochs, _, _ = EPOCHS[network]
    return {
        "model": NETWORKS[network],
        "data": data_section(data),
        "budget": None,
        "quantization": {"weight_bits": 8, "activation_bits": 8},
        "stages": {"float": {"epochs": epochs}, "search": {"epochs": 0}, "finetune": {"epochs": 0}},
        "optimizer": {"lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 0.5, "final": 0.0},
        "channels_last": True,
        "threads": 1,
        "seed": seed,
    }


def budget_config(network: str, seed: int, bits: float, data: Path, runs: Path) -> dict[str, Any]:
    """Search and fine-tune at one budget, from the float cell's weights."""
    _, search, finetune = EPOCHS[network]
    weights = str(runs / cell_name(network, seed, None) / "float.pt")
    return {
        "model": NETWORKS[network] | {"weights": weights},
        "data": data_section(data),
        "budget": {"average_bits": {"weights": bits, "activations": bits}},
        "stages": {"search": {"epochs": search}, "finetune": {"epochs": finetune, "lr": 0.01}},
        "optimizer": {
            "lr": 0.02,
            "weight_decay": 5e-4,
            "quantizer_optimizer": "adam",
            "range_lr": 0.003,
            "bits_lr": 0.02,
            "final": 0.0,
        },
        "teacher": NETWORKS[network] | {"weights": weights, "weight": 1.0},
        "allocation": "middle",
        "batchnorm_batches": 50,
        "channels_last": True,
        "threads": 1,
        "seed": seed,
    }


def data_section(data: Path) -> dict[str, Any]:
    """5,000 of the 60,000 training images are held out for validation."""
    return {"kind": "fashion_mnist", "path": str(data), "batch_size": 128, "eval_batch_size": 500, "validation": 1 / 12}


def cell_name(network: str, seed: int, bits: float | None) -> str:
    """Name of a cell's run folder and record."""
    return f"{network}-{'float' if bits is None else f'{bits:g}bit'}-seed{seed}"


def cells() -> Iterator[tuple[str, int, float | None]]:
    """All cells, seed by seed, so that what is done at any moment is a table with fewer seeds."""
    for seed in SEEDS:
        for network in NETWORKS:
            yield network, seed, None
        for bits in BUDGETS:
            for network in NETWORKS:
                yield network, seed, bits


def run_cell(network: str, seed: int, bits: float | None, data: Path, runs: Path) -> None:
    """Train one cell to the end and append its record; a float cell whose weights were lost keeps the one it has."""
    from nipq.train import run
    from nipq.train.config import check_config

    name = cell_name(network, seed, bits)
    config = float_config(network, seed, data) if bits is None else budget_config(network, seed, bits, data, runs)
    results = run(check_config(config), runs / name, resume=True, quiet=True)
    if name in RESULTS.read():
        return
    record = {
        "cell": {"name": name, "network": network, "seed": seed, "bits": bits},
        "command": "python experiments/fashion_mnist/grid.py --data FOLDER --runs RUNS",
        "config": without_paths(config),
        "machine": {"processor": processor(), "threads": 1, "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("nipq", "torch", "torchvision")},
        },
        "results": results,
        "learned_bits": learned_bits(runs / name / "metrics.jsonl"),
    }
    RESULTS.append(record)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config with this machine's folders taken out."""
    text = json.dumps(config)
    for section in ("model", "teacher", "data"):
        for key in ("path", "weights"):
            value = config.get(section, {}).get(key)
            if isinstance(value, str):
                text = text.replace(json.dumps(value), json.dumps(Path(value).name if key == "weights" else "FOLDER"))
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def learned_bits(metrics: Path) -> dict[str, Any]:
    """Soft bits of every layer after the last search epoch, before they were snapped."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    search = [row for row in rows if row["stage"] == "search"]
    return dict(search[-1]["layer_bits"]) if search else {}


def done(cell: tuple[str, int, float | None], runs: Path) -> bool:
    """Return whether a cell has its record, and a float cell the weights from which others start."""
    name = cell_name(*cell)
    return name in RESULTS.read() and (cell[2] is not None or (runs / name / "float.pt").is_file())


def main() -> int:
    """Run what is not done, one process a cell, float cells before the cells that start from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the four idx files")
    parser.add_argument("--runs", type=Path, required=True, help="where run folders and checkpoints go")
    parser.add_argument("--workers", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--cell", nargs=3, metavar=("NETWORK", "SEED", "BITS"), help="one cell; BITS may be 'float'")
    arguments = parser.parse_args()
    if arguments.cell:
        network, seed, bits = arguments.cell
        run_cell(network, int(seed), None if bits == "float" else float(bits), arguments.data, arguments.runs)
        return 0
    waiting = [cell for cell in cells() if not done(cell, arguments.runs)]
    running: dict[tuple[str, int, float | None], subprocess.Popen[bytes]] = {}
    failed = 0
    while waiting or running:
        for cell, process in list(running.items()):
            if process.poll() is not None:
                failed += process.returncode != 0
                print("done  " if process.returncode == 0 else "FAILED", cell_name(*cell), flush=True)
                del running[cell]
        ready = [cell for cell in waiting if cell[2] is None or done((*cell[:2], None), arguments.runs)]
        if not running and not ready:
            break
        while ready and len(running) < arguments.workers:
            cell = ready.pop(0)
            waiting.remove(cell)
            network, seed, bits = cell
            command = [sys.executable, __file__, "--data", str(arguments.data), "--runs", str(arguments.runs)]
            command += ["--cell", network, str(seed), "float" if bits is None else str(bits)]
            running[cell] = subprocess.Popen(command)
        time.sleep(1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
