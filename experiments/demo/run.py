"""The promise of ``nipq demo`` over several seeds, with its wall time.

    python experiments/demo/run.py            # writes experiments/demo/results.jsonl

Each seed is one ``nipq demo --json`` in a process of its own, imports included, so the wall time is what a user waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nipq.train.run_folder import write_text

RESULTS = Path(__file__).parent / "results.jsonl"


def one(seed: int) -> dict[str, Any]:
    """Run the demo with one seed; its numbers and its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "nipq",
            "demo",
            "--json",
            "--seed",
            str(seed),
            "--run",
            str(Path(folder) / "run"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
    answer = json.loads(done.stdout)
    keep = ("states", "average_bits", "bytes", "verified", "promises", "steps")
    return {"seed": seed, "exit": done.returncode, "wall_seconds": seconds, **{key: answer[key] for key in keep}}


def main() -> int:
    """All seeds, one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    runs = [one(seed) for seed in range(arguments.seeds)]
    record = {
        "command": "python experiments/demo/run.py",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nipq", "torch", "scikit-learn")},
        },
        "runs": runs,
    }
    write_text(RESULTS, json.dumps(record) + "\n")
    for run in runs:
        print(run["seed"], f"{run['wall_seconds']:.1f} s", run["promises"])
    return 0 if all(run["exit"] == 0 for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
