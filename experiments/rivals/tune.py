"""The learning rate and the cut of the epochs, for the noise proxy and for LSQ, on the validation images of seed 0.

No test score is kept.

    python experiments/rivals/tune.py --data FOLDER --runs RUNS            # everything that is not done yet

Reads the grid beside it for everything else. One JSON for each candidate in ``results/tuning``; a
candidate whose file exists is skipped, a killed one continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from nipq.train import run
from nipq.train.config_file import check_config
from nipq.train.merging import merged
from nipq.train.methods import METHODS

HERE = Path(__file__).parent
GRID = HERE / "fashion_mobilenet_v2.yaml"
RESULTS = HERE / "results" / "tuning"
SEED, BUDGET = 0, "3/3"

ADAM = {"quantizer_optimizer": "adam", "boundary_lr": 0.003}
LR = {"lr": 0.05}


def split(search: int, finetune: int, lr: float = 0.05) -> dict[str, Any]:
    """The five epochs cut otherwise: as many in the second stage, at its own learning rate."""
    return {"search": {"epochs": search}, "finetune": {"epochs": finetune, "lr": lr}}


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "lsq": [
        {"optimizer": {"lr": 0.02}},
        {"optimizer": {"lr": 0.05}},
        {"optimizer": {"lr": 0.1}},
        {"optimizer": {**LR, **ADAM}},
        {"optimizer": LR, "stages": split(3, 2)},
    ],
    "nipq": [
        {"optimizer": {"lr": 0.02}, "bit_start": "middle"},
        {"optimizer": {"lr": 0.05}, "bit_start": "middle"},
        {"optimizer": LR, "stages": split(3, 2), "bit_start": "middle"},
        {"allocation": "hawq"},
        {"bit_start": "noise"},
        {"bit_start": "noise", "stages": split(3, 2)},
        {"bit_start": "noise", "stages": {"finetune": {"lr": 0.03}}},
        {"bit_start": "noise", "optimizer": {"bits_lr": 0.005}},
        {"stages": split(3, 2, 0.015)},
        {"tempering": "linear"},
        {"quantization": {"boundary_correction": True}},
        {"quantization": {"noise": "empirical"}},
        {"stages": {"finetune": {"lr": 0.02}}},
        {"stages": split(2, 3, 0.03)},
    ],
}


def configs(data: Path, runs: Path) -> dict[str, dict[str, Any]]:
    """Every run by its name; the first is the float start of the others."""
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    common = {"data": {"path": str(data)}, "seed": SEED}
    rounded = {
        "quantization": {"weight_bits": 8, "activation_bits": 8},
        "budget": None,
        "teacher": None,
        "stages": {"search": {"epochs": 0}, "finetune": {"epochs": 0}},
    }
    found = {"float": merged(grid["base"], rounded, grid["float"], common)}
    start = {**grid["base"]["model"], "weights": str(runs / "float" / "float.pt")}
    for method, candidates in CANDIDATES.items():
        for number, fields in enumerate(candidates):
            found[f"{method}-{number}"] = merged(
                grid["base"],
                METHODS[method],
                {"model": start, "teacher": start, "budget": grid["budgets"][BUDGET]},
                fields,
                common,
            )
    return found


def run_one(name: str, data: Path, runs: Path) -> None:
    """Train one candidate and write down what the validation images say."""
    config = configs(data, runs)[name]
    results = run(check_config(config), runs / name, resume=True, quiet=True)
    states = {state: scores["validation"] for state, scores in results["states"].items()}
    method, _, number = name.rpartition("-")
    record = {
        "method": method or name,
        "fields": CANDIDATES[method][int(number)] if method else {},
        "validation": states,
        "average_bits": results["average_bits"],
        "seconds": results["seconds"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """Run what is not done, the float start first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the four idx files")
    parser.add_argument("--runs", type=Path, required=True, help="where run folders and checkpoints go")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--one", help="one run, by its name")
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.data, arguments.runs)
        return 0
    waiting = [name for name in configs(arguments.data, arguments.runs) if not (RESULTS / f"{name}.json").is_file()]
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            failed += process.returncode != 0
        alone = "float" in waiting or not (RESULTS / "float.json").is_file()  # nothing starts before it is done
        while waiting and len(running) < (1 if alone else arguments.workers):
            command = [sys.executable, __file__, "--data", str(arguments.data), "--runs", str(arguments.runs)]
            running.append(subprocess.Popen([*command, "--one", waiting.pop(0)]))
        time.sleep(1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
