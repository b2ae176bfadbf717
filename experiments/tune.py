"""Settings of a grid, tried on the validation samples of one seed. No test score is kept.

    python experiments/tune.py experiments/baselines/candidates.yaml --data FOLDER --runs RUNS

Everything that the candidates leave open comes from their grid. One line for each candidate in the file of results; a
candidate that has its line is skipped, a killed one continues. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from nipq.train import run
from nipq.train.config import METHODS, check_config, merged
from nipq.train.records import Records

#: A run that trains the float network and nothing else.
_FLOAT = {
    "quantization": {"weight_bits": 8, "activation_bits": 8},
    "budget": None,
    "teacher": None,
    "stages": {"search": {"epochs": 0}, "finetune": {"epochs": 0}},
}


class Tuning:
    """One file of candidates: what to run, and where records go.

    Args:
        file: names grid, budget, seed, file of the results, and the changed fields of every candidate, by method.
        data: folder of the task's data.
        runs: where run folders and checkpoints go.
    """

    def __init__(self, file: Path, data: Path, runs: Path) -> None:
        self._chosen = yaml.safe_load(file.read_text(encoding="utf-8"))
        self._grid = yaml.safe_load((file.parent / self._chosen["grid"]).read_text(encoding="utf-8"))
        self._data, self._runs = data, runs
        self.results = Records(file.parent / self._chosen["results"], lambda record: str(record["name"]))

    def fields(self, name: str) -> dict[str, Any]:
        """Settings that one run changes of its grid."""
        method, _, number = name.rpartition("-")
        return self._chosen["candidates"][method][int(number)] if method else {}

    def configs(self) -> dict[str, dict[str, Any]]:
        """Every run by its name; the first is the float start of the others."""
        base, common = self._grid["base"], {"data": {"path": str(self._data)}, "seed": self._chosen["seed"]}
        first = merged(base, _FLOAT, self._grid["float"], common)
        if "weights" in first["model"]:  # a path in the run folder, as in `nipq compare`
            first["model"]["weights"] = str(self._runs / Path(first["model"]["weights"]).name)
        start = {**base["model"], "weights": str(self._runs / "float" / "float.pt")}
        cell = {
            "model": start,
            "teacher": start,
            "budget": self._grid["budgets"][self._chosen["budget"]],
            "stages": {"float": {"epochs": 0}},
        }
        return {"float": first} | {
            f"{method}-{number}": merged(base, METHODS[method], cell, fields, common)
            for method, candidates in self._chosen["candidates"].items()
            for number, fields in enumerate(candidates)
        }

    def run_one(self, name: str) -> None:
        """Train one candidate and write down what the validation images say."""
        results = run(check_config(self.configs()[name]), self._runs / name, resume=True, quiet=True)
        record = {
            "name": name,
            "method": name.rpartition("-")[0] or name,
            "fields": self.fields(name),
            "validation": {state: scores["validation"] for state, scores in results["states"].items()},
            "average_bits": results["average_bits"],
            "seconds": results["seconds"],
        }
        self.results.append(record)


def main() -> int:
    """Run what is not done, the float start first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path, help="the YAML with grid, budget, seed and candidates")
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's data")
    parser.add_argument("--runs", type=Path, required=True, help="where run folders and checkpoints go")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--one", help="one run, by its name")
    given = parser.parse_args()
    sys.path.insert(0, str(Path.cwd()))  # as `python -m nipq` does: tasks are named from the repository's root
    tuning = Tuning(given.candidates, given.data, given.runs)
    if given.one:
        tuning.run_one(given.one)
        return 0
    done = tuning.results.read()
    waiting = [name for name in tuning.configs() if name not in done]
    again = [sys.executable, __file__, str(given.candidates), "--data", str(given.data), "--runs", str(given.runs)]
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            failed += process.returncode != 0
        alone = "float" not in tuning.results.read()  # nothing starts before it is done
        while waiting and len(running) < (1 if alone else given.workers):
            running.append(subprocess.Popen([*again, "--one", waiting.pop(0)]))
        time.sleep(1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
