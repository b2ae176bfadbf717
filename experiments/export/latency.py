"""Milliseconds of one image at 224x224: float and quantized in PyTorch, Inductor, OpenVINO and ONNX Runtime.

    python -m experiments.export.latency --runtime openvino    # with openvino installed
    python -m experiments.export.latency --runtime inductor    # with torchao installed

MobileNet-v2 and ResNet-18 with random weights, 8 bits everywhere and mixed bits of 2 to 8, one and two threads, one
process for each network and number of threads. Everything in a process takes turns, in an order that is drawn anew in
each round; a ratio is the median over rounds of the times of one round, against the same runtime's own float. With one
thread CPU time counts, which other programs disturb less; with two wall time. Every layer that should run in integers
does, or there is no result. Needs torchvision and the extras `onnx` and, by choice, `openvino` or `inductor`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import nipq
from experiments.export.random_nets import built, quantized, shaken_
from experiments.export.records import each, origin, parser, short, write
from experiments.shown import Record
from nipq.errors import require
from nipq.export.inductor import inductor_model
from nipq.export.openvino import PRECISION, openvino_model
from nipq.export.runtimes import CompiledModel, faithful_session

COMMAND = "python -m experiments.export.latency"
NETWORKS, THREADS, SIZE, SEED = ("resnet18", "mobilenet_v2"), (1, 2), 224, 0
#: Quantized forms by name: bits of all layers, or the range that they are drawn from.
BITS: dict[str, int | tuple[int, int]] = {"w8a8": 8, "mixed": (2, 8)}
RUNTIMES = ("ONNX Runtime", "OpenVINO", "Inductor", "PyTorch")
WARM_UP = 3

Call = Callable[[], object]
Clock = Callable[[], float]


def deployed_network(name: str, bits: int | tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """A network with random weights, quantized and deployed, and one image.

    Args:
        name: of the network.
        bits: of its layers.
    """
    torch.manual_seed(SEED)
    model = built(name, SIZE)
    images = torch.randn(4, 3, SIZE, SIZE)
    return nipq.convert(quantized(shaken_(model, images), images, SEED, bits=bits)), images[:1]


def float_network(name: str) -> nn.Module:
    """The same network before it is quantized.

    Args:
        name: of the network.
    """
    torch.manual_seed(SEED)
    model = built(name, SIZE)
    return shaken_(model, torch.randn(4, 3, SIZE, SIZE))


def onnx_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime as it comes.

    Args:
        path: of the file.
        threads: of one operator.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_call(session: onnxruntime.InferenceSession, x: Tensor) -> Call:
    """One run of a session.

    Args:
        session: of ONNX Runtime.
        x: the image.
    """
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def contenders(name: str, runtime: str, threads: int, folder: Path) -> tuple[dict[str, Call], Record]:
    """Everything that takes turns, and on which kernels it runs.

    Args:
        name: of the network.
        runtime: ``openvino`` or ``inductor``.
        threads: of one inference.
        folder: for the files.
    """
    network = float_network(name)
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    torch.onnx.export(network, (x,), str(folder / "float.onnx"), dynamo=True, external_data=False, verbose=False)
    calls: dict[str, Call] = {
        "PyTorch float": partial(network, x),
        "ONNX Runtime float": session_call(onnx_session(folder / "float.onnx", threads), x),
    }
    kernels: Record = {}
    if runtime == "openvino":
        core = require("openvino", extra="openvino", purpose="its latency").Core()
        plain = core.read_model(folder / "float.onnx")
        plain.reshape(list(x.shape))
        compiled = core.compile_model(plain, "CPU", PRECISION | {"INFERENCE_NUM_THREADS": threads})
        # Requests are made once: making one costs about as much as running a small network.
        calls["OpenVINO float"] = partial(compiled.create_infer_request().infer, {0: x.numpy()})
    else:
        fused: Any = torch.compile(network, dynamic=False)
        calls["Inductor float"] = partial(_frozen, fused, x)
    for form, bits in BITS.items():
        deployed, _ = deployed_network(name, bits)
        path = folder / f"{form}.onnx"
        nipq.export(deployed, path, x)
        calls[f"ONNX Runtime faithful {form}"] = session_call(faithful_session(path, threads=threads), x)
        calls[f"ONNX Runtime default {form}"] = session_call(onnx_session(path, threads), x)
        model: CompiledModel
        if runtime == "openvino":
            model = openvino_model(path, x, threads=threads)
            request = model.program({0: x}).create_infer_request()
            calls[f"OpenVINO {form}"] = partial(request.infer, {0: x.numpy()})
        else:
            model = inductor_model(deployed, x)
            calls[f"Inductor {form}"] = partial(model, x)
        model.check_integer()
        found = model.kernels
        kernels[form] = {
            "layers": len(found),
            "integer": sum(kernel.integer for kernel in found),
            "expected": sum(kernel.expected for kernel in found),
            "float": [f"{kernel.name}: {kernel.what}" for kernel in found if not kernel.integer],
        }
    return calls, kernels


def _frozen(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """With weights as constants, which is what the int8 kernels have too."""
    with inductor_config.patch(freezing=True):
        return model(x)


def interleaved(calls: dict[str, Call], rounds: int, clock: Clock, seed: int = SEED) -> dict[str, list[float]]:
    """Seconds of each call, one in each round, in an order drawn anew for each round.

    Each is called once before it is timed: what the one before left in the caches, and threads of other runtimes that
    wait for work in a loop, are gone by then.

    Args:
        calls: by name.
        rounds: how many.
        clock: what is read before and after.
        seed: of the orders.
    """
    draw, samples = random.Random(seed), {name: list[float]() for name in calls}
    for number in range(-WARM_UP, rounds):
        for name in draw.sample(list(calls), len(calls)):
            calls[name]()
            started = clock()
            calls[name]()
            if number >= 0:
                samples[name].append(clock() - started)
    return samples


def quartiles(values: list[float], digits: int = 4) -> list[float]:
    """Lower quartile, median, upper quartile.

    Args:
        values: at least two.
        digits: after the point.

    Example:
        >>> quartiles([3.0, 1.0, 2.0])
        [1.5, 2.0, 2.5]
    """
    return [round(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive")]


def own_float(name: str) -> str:
    """The float form of the same runtime.

    Args:
        name: of a contender.

    Example:
        >>> own_float("ONNX Runtime faithful w8a8"), own_float("OpenVINO mixed")
        ('ONNX Runtime float', 'OpenVINO float')
    """
    return next(
        f"{runtime} float" for runtime in ("ONNX Runtime", "OpenVINO", "Inductor", "PyTorch") if runtime in name
    )


@torch.no_grad()
def measure(name: str, runtime: str, threads: int, rounds: int) -> Record:
    """One network on so many threads.

    Args:
        name: of the network.
        runtime: ``openvino`` or ``inductor``.
        threads: of one inference.
        rounds: how many.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    facts: Record = {"name": name, "runtime": runtime, "threads": threads, "rounds": rounds, "seed": SEED, "size": SIZE}
    command = f"{COMMAND} --runtime {runtime} --rounds {rounds}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            calls, facts["kernels"] = contenders(name, runtime, threads, Path(folder))
            before = origin(command, 0)["machine"]["load"]
            samples = interleaved(calls, rounds, time.process_time if threads == 1 else time.perf_counter)
        facts["rows"] = {
            contender: {
                "milliseconds": quartiles([1000 * value for value in values], 2),
                "speed": quartiles([a / b for a, b in zip(samples[own_float(contender)], values, strict=True)], 3),
            }
            for contender, values in samples.items()
        }
        facts["load_before"] = before
    except Exception as error:  # whatever it is, it is the result
        facts["error"] = short(error)
    return facts | origin(command, time.perf_counter() - started)


def main() -> int:
    """Measure."""
    options: argparse.ArgumentParser = parser(__doc__, "latency", 900)
    options.add_argument("--runtime", required=True, choices=["openvino", "inductor"])
    options.add_argument("--rounds", type=int, default=50, help="samples of each contender (default: %(default)s)")
    options.add_argument("--network", nargs="*", default=NETWORKS, choices=NETWORKS, help="both if left out")
    options.add_argument("--threads", nargs="*", default=THREADS, type=int, help="1 and 2 if left out")
    given = options.parse_args()
    if given.here:
        (name,), (threads,) = given.network, given.threads
        write(given.out, f"{name}-{given.runtime}-{threads}", measure(name, given.runtime, threads, given.rounds))
        return 0
    same = ["--runtime", given.runtime, "--rounds", str(given.rounds)]
    items = [
        (f"{name}-{given.runtime}-{threads}", [*same, "--network", name, "--threads", str(threads)])
        for name in given.network
        for threads in given.threads
    ]
    return int(each("experiments.export.latency", items, f"{COMMAND} --runtime {given.runtime}", given) > 0)


if __name__ == "__main__":
    sys.exit(main())
