"""E0 to E3 of `nipq verify` for trained models: every file and every runtime, on held-out data, with the task's metric.

    python -m experiments.export.trained --group digits RUN...            # run folders of nipq train, demo or compare
    python -m experiments.export.trained --group baselines --only model.onnx RUN...

Each trained model is written as a packed file, ONNX, plain and packed, arrays and a torch.export program; these and
OpenVINO's compiled form are compared with it, and so is the packed file that the run itself wrote; `--only` names fewer
files. Needs the extras `onnx` and `openvino`; without OpenVINO its part is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import nipq
from experiments.export.records import each, origin, parser, rungs_of, short, write
from experiments.shown import Record
from nipq.export.openvino import openvino_model
from nipq.export.runtimes import faithful_session
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.train.batches import Few, count_of, pick
from nipq.train.data import load_data
from nipq.train.factory import build_model, build_task, read_state
from nipq.train.pipeline import metric_of
from nipq.train.run_folder import RunFolder, installed_version
from nipq.verify.archives import ProgramModule
from nipq.verify.metrics import logits_of
from nipq.verify.onnx import OnnxModule
from nipq.verify.reference import AT_ONCE, run_model

COMMAND = "python -m experiments.export.trained"
FILES = ("model.onnx", "packed.onnx", "model.npz", "model.pt2")

Batches = list[tuple[Any, Any]]
Metric = Callable[[nn.Module, Iterable[Any]], float]


def trained_run(place: RunFolder, samples: int) -> tuple[nn.Module, Batches, Metric]:
    """The trained model of a finished run, test data in small batches, and the task's metric.

    Args:
        place: the run.
        samples: of the test data.
    """
    config = place.read_config()
    test = load_data(config.data, config.seed).test
    batches: Batches = []
    left = samples
    for inputs, targets in Few(test, samples):
        count = min(left, count_of(inputs))
        cuts = [slice(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]
        batches += [(pick(inputs, cut), pick(targets, cut)) for cut in cuts]
        left -= count
        if not left:
            break
    model = build_model(config.model, with_weights=False)
    nipq.prepare_(model, pick(batches[0][0], slice(1)), config.quantization)
    model.load_state_dict(read_state(place.trained))
    set_phase_(model, "round")
    return model.eval(), batches, metric_of(build_task(config))


@torch.no_grad()
def differences(reference: nn.Module, others: dict[str, nn.Module], batches: Batches, metric: Metric) -> Record:
    """Distance of the logits of others from those of the deployed model, in units of its largest, and their metric.

    Args:
        reference: the deployed model.
        others: by name.
        batches: inputs and targets.
        metric: the task's.
    """
    ours = torch.cat([logits_of(run_model(reference, inputs)).flatten() for inputs, _ in batches])
    largest = float(ours.abs().max())
    found: Record = {"deployed": {"metric": metric(reference, batches)}}
    for name, module in others.items():
        theirs: Tensor = torch.cat([logits_of(run_model(module, inputs)).flatten() for inputs, _ in batches])
        apart = (theirs - ours).abs() / largest
        found[name] = {"largest": float(apart.max()), "mean": float(apart.mean()), "metric": metric(module, batches)}
    return found


def default_session(path: Path) -> OnnxModule:
    """ONNX Runtime as it comes: what people get who open the file without reading docs/guide/exporting/index.md.

    Args:
        path: of the ONNX file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return OnnxModule(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), path)


def _faithful(path: Path) -> OnnxModule:
    return OnnxModule(faithful_session(path, threads=1), path)


def _program(path: Path) -> ProgramModule:
    return ProgramModule(torch.export.load(path))


#: Who reads which file, as the pages' table calls it.
READERS: dict[str, tuple[str, Callable[[Path], nn.Module]]] = {
    "program": ("model.pt2", _program),
    "faithful": ("model.onnx", _faithful),
    "faithful, packed": ("packed.onnx", _faithful),
    "default": ("model.onnx", default_session),
}


def compared(place: RunFolder, samples: int, names: Sequence[str], folder: Path) -> Record:
    """Everything about one run.

    Args:
        place: the run.
        samples: of the test data.
        names: of the files to write beside the packed one; ``model.onnx`` is always among them.
        folder: for the files.
    """
    model, batches, metric = trained_run(place, samples)
    config = place.read_config()
    example = pick(batches[0][0], slice(2))
    deployed = nipq.convert(model).eval()
    packed = nipq.save(deployed, folder / "model.nipq.safetensors")
    facts: Record = {
        "method": config.method,
        "model": config.model.factory,
        "seed": config.seed,
        "task": build_task(config).to_dict(),
        "samples": sum(count_of(inputs) for inputs, _ in batches),
        "layers": len(layer_table(model)),
        "bytes": {packed.name: packed.stat().st_size},
    }
    for name in names:
        report = nipq.export(deployed, folder / name, example, pack=name == "packed.onnx")
        facts["bytes"][name] = report.bytes
    others = {title: opened(folder / name) for title, (name, opened) in READERS.items() if name in names}
    compiled = []
    if installed_version("openvino") is not None:
        runtime = openvino_model(folder / "model.onnx", batches[0][0], threads=1, strict=False)
        facts["openvino"] = {
            "integer": sum(kernel.integer for kernel in runtime.kernels),
            "expected": sum(kernel.expected for kernel in runtime.kernels),
            "refused": list(runtime.float_layers()),
            "warnings": list(runtime.warnings),
        }
        others["openvino"] = runtime
        compiled = [runtime]
    files = [packed, *(folder / name for name in names)]
    result = nipq.verify(model, *files, *compiled, loader=batches, metric=metric)
    facts["rungs"] = rungs_of(result)
    # The run wrote its file with the library of its day, which may have computed boundaries to another last digit.
    own = nipq.verify(model, place.model, loader=batches[:1])
    facts["own_file"] = {"passed": bool(own), "first_difference": own.first_difference}
    facts["differences"] = differences(deployed, others, batches, metric)
    return facts


def measure(place: RunFolder, group: str, samples: int, names: Sequence[str]) -> Record:
    """One run; a failure is its result.

    Args:
        place: the run.
        group: what its models have in common.
        samples: of the test data.
        names: of the files, as for :func:`compared`.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    facts: Record = {"name": place.path.name, "group": group}
    try:
        with tempfile.TemporaryDirectory() as folder:
            facts |= compared(place, samples, names, Path(folder))
    except Exception as error:  # whatever it is, it is the result
        facts["error"] = short(error)
    command = f"{COMMAND} --group {group} --samples {samples}{_only(names)} RUNS/{place.path.name}"
    return facts | origin(command, time.perf_counter() - started)


def _only(names: Sequence[str]) -> str:
    return "" if tuple(names) == FILES else f" --only {','.join(names)}"


def main() -> int:
    """Measure."""
    options: argparse.ArgumentParser = parser(__doc__, "trained", 600)
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    options.add_argument("--group", required=True, help="what the runs have in common")
    options.add_argument("--samples", type=int, default=512, help="of the test data (default: %(default)s)")
    options.add_argument("--only", default=",".join(FILES), help="files to write, with commas (default: %(default)s)")
    given = options.parse_args()
    names = given.only.split(",")
    if "model.onnx" not in names or set(names) - set(FILES):
        options.error(f"--only: expected model.onnx and others of {', '.join(FILES)}; found {given.only}")
    places = {run.resolve(): f"{given.group}/{run.resolve().name}" for run in given.runs}
    if given.here:
        for run, item in places.items():
            write(given.out, item, measure(RunFolder(run), given.group, given.samples, names))
        return 0
    same = ["--group", given.group, "--samples", str(given.samples), "--only", given.only]
    items = [(item, [str(run), *same]) for run, item in places.items()]
    command = f"{COMMAND} --group {given.group} --samples {given.samples}{_only(names)} RUNS"
    return int(each("experiments.export.trained", items, command, given) > 0)


if __name__ == "__main__":
    sys.exit(main())
