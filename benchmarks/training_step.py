"""Time and memory of a whole training step: forward, loss and penalty, backward, optimizer, search.

python -m benchmarks.training_step --overwrite             # eager, all variants
python -m benchmarks.training_step --compile --overwrite   # compiled whole, against compiled float

write results/training_step.jsonl and results/compiled.jsonl, in about 20 and 10 minutes. Every variant of a network
starts from the same weights and data. They take turns in one process; a ratio is that of one round's times, and what is
kept is its median and quartiles. With one thread CPU time counts, with two wall time. Ratios are to the float step in
the memory format in which that is faster; float and nipq are timed in the other one, too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import record
from benchmarks.memory import peak_growth, saved_bytes
from benchmarks.networks import NETWORKS, Network
from benchmarks.timing import Samples, interleaved, on_threads, quartiles, ratio
from benchmarks.variants import FLOAT, PEERS, UNIFORM, VARIANTS, Training, prepared
from nipq.errors import MissingDependencyError

#: What is compiled whole. Convolutional networks are in the format that the compiler prefers, too.
COMPILED, COMPILED_LAYOUT = (FLOAT, UNIFORM), {"resnet18": "channels_last", "mobilenet_v2": "channels_last"}

Key = tuple[str, str]


def faster_layout(network: Network) -> str:
    """The memory format in which the float network trains faster."""
    tasks = {layout: prepared(FLOAT, network, layout).step for layout in network.layouts}
    samples = interleaved(tasks, 9, large=True)
    first = samples[network.layouts[0]]
    return min(tasks, key=lambda layout: ratio(samples[layout], first).median)


def trainings(network: Network, variants: list[str], faster: str) -> tuple[dict[Key, Training], list[str]]:
    """Trainings to time, by variant and layout, and notes on peers that are missing or fail."""
    found: dict[Key, Training] = {}
    notes = []
    for variant in variants:
        for layout in sorted(network.layouts, key=lambda layout: layout != faster):
            if (variant, faster) in found and variant not in (FLOAT, UNIFORM):
                continue
            try:
                training = prepared(variant, network, layout)
                training.step()
            except (MissingDependencyError, RuntimeError) as error:
                if variant not in PEERS:
                    raise
                notes.append(f"{variant}, {layout}: {str(error).splitlines()[0]}")
                print(notes[-1], flush=True)
                continue
            found[variant, layout] = training
    return found, notes


def memory(training: Training) -> dict[str, int | None]:
    """Bytes kept for backward besides parameters and buffers, and growth of the process in a step."""
    present = [*training.model.parameters(), *training.model.buffers()]
    training.step()
    return {"saved": saved_bytes(training.loss, present), "peak": peak_growth(training.step)}


def rows_of(samples: Samples, faster: str) -> dict[str, dict[str, Any]]:
    """Times and ratios by variant and layout."""
    base = samples[_name(FLOAT, faster)]
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in samples.items():
        variant, layout = name.split(" | ")
        row = {"milliseconds": quartiles(seconds).times(1e3).rounded(), "ratio": ratio(seconds, base).rounded()}
        rows.setdefault(variant, {})[layout] = row
    return rows


def _name(variant: str, layout: str) -> str:
    return f"{variant} | {layout}"


def measure(name: str, variants: list[str], rounds: int, threads: list[int]) -> dict[str, Any]:
    """One network, eager."""
    network = NETWORKS[name]
    with on_threads(1):
        faster = faster_layout(network)
        found, notes = trainings(network, variants, faster)
        kept = {_name(*key): memory(training) for key, training in found.items()}
    result: dict[str, Any] = {"shown": network.shown, "batch": network.batch, "shape": network.shape, "notes": notes}
    result |= {"reference": faster, "memory": kept, "threads": {}}
    for count in threads:
        tasks = {_name(*key): training.step for key, training in found.items()}
        rows = rows_of(interleaved(tasks, rounds, threads=count, large=True), faster)
        result["threads"][str(count)] = rows
        print(f"{network.shown}, {count} thread(s), reference {faster}", flush=True)
        for variant, row in rows.items():
            print(f"  {variant:30}", {key: value["ratio"] for key, value in row.items()}, flush=True)
    return result


def measure_compiled(name: str, rounds: int) -> dict[str, Any]:
    """One network compiled whole, and the float network not compiled."""
    network, layout = NETWORKS[name], COMPILED_LAYOUT.get(name, "contiguous")
    tasks, cold, saved = {"float, eager": prepared(FLOAT, network, layout).step}, {}, {}
    with on_threads(1):
        for variant in COMPILED:
            torch.compiler.reset()
            training = prepared(variant, network, layout)
            own = training.model
            present = [*own.parameters(), *own.buffers()]
            training.model = torch.compile(own, fullgraph=True)  # type: ignore[assignment]  # still a module
            start = time.perf_counter()
            training.step()
            cold[variant] = round(time.perf_counter() - start, 1)
            saved[variant] = saved_bytes(training.loss, present)
            tasks[variant] = training.step
            print(f"{network.shown}, {variant}: compiled in {cold[variant]} s", flush=True)
    samples = interleaved(tasks, rounds, threads=1, large=True)
    rows = {
        variant: {
            "milliseconds": quartiles(seconds).times(1e3).rounded(),
            "ratio": ratio(seconds, samples[FLOAT]).rounded(),
        }
        for variant, seconds in samples.items()
    }
    print({variant: row["ratio"] for variant, row in rows.items()}, flush=True)
    return {"shown": network.shown, "layout": layout, "rows": rows, "compile_seconds": cold, "saved": saved}


def main() -> None:
    """Measure and write."""
    options = record.parser(__doc__, "training_step", 9)
    options.add_argument("--compile", action="store_true", help="whole models through torch.compile")
    options.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    given: argparse.Namespace = options.parse_args()
    if given.compile and given.out == options.get_default("out"):
        given.out = given.out.with_name("compiled.jsonl")
    record.refuse_existing(given.out, overwrite=given.overwrite)
    origin, networks = record.origin(record.load()), {}
    for name in given.networks:
        networks[name] = (
            measure_compiled(name, given.rounds)
            if given.compile
            else measure(name, given.variants, given.rounds, given.threads)
        )
        record.write(given.out, {**origin, "rounds": given.rounds, "networks": networks})


if __name__ == "__main__":
    main()
