"""Times one element and one call of the quantizer, against a copy, an add, a ReLU and torch's fake-quant.

python -m benchmarks.elements --overwrite        # results/elements.jsonl, in about four minutes

The limit of any element-wise function with a gradient is one copy forward (read, write a fresh result) and one add
backward (read two, write one). All take turns in one process; with one thread CPU time counts, with two wall time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.memory import saved_bytes
from benchmarks.peers import TorchFakeQuantize
from benchmarks.plain import plain_operations
from benchmarks.timing import interleaved, quartiles, ratio, total
from nipq.config import BitRange, NoiseKind, Phase
from nipq.nn.estimators import NoiseProxy
from nipq.nn.quantizer import TensorQuantizer

SIZES = (1 << 22, 1 << 16)
TYPES = ("float32", "bfloat16")
THREADS = (1, 2)
TINY = 16
#: Seconds of one sample; shorter calls are repeated within it.
LEAST = 0.02

Function = Callable[[Tensor], Tensor]
Pair = tuple[Callable[[], object], Callable[[], object]]


def quantizer(noise: NoiseKind = "uniform", phase: Phase = Phase.NOISE) -> TensorQuantizer:
    """A quantizer in training, its clipping range inside normal data, 4 bits in the middle of its range."""
    module = TensorQuantizer("x", BitRange(min=2, max=6), estimator=NoiseProxy(noise=noise))
    module.set_alpha_(torch.tensor([2.5]))
    module.phase = phase
    return module.train()


def _torch() -> TorchFakeQuantize:
    module = TorchFakeQuantize(signed=True)
    module.start_(torch.tensor([2.5]))
    return module


def _plain(module: nn.Module) -> Function:
    def run(x: Tensor) -> Tensor:
        with plain_operations():
            out: Tensor = module(x)
        return out

    return run


def functions(names: Collection[str] | None = None) -> dict[str, tuple[Function, list[Tensor]]]:
    """Functions to time, with the parameters that get a gradient besides x; all, or those of some names."""
    modules = {
        "ReLU": nn.ReLU(),
        "nipq": quantizer(),
        "nipq, empirical noise": quantizer("empirical"),
        "nipq, rounding": quantizer(phase=Phase.ROUND),
        "torch learnable fake-quant": _torch(),
    }
    plain = {
        "nipq, plain operations": quantizer(),
        "nipq, empirical noise, plain operations": quantizer("empirical"),
        "nipq, published sampler, plain operations": quantizer("histogram"),
        "nipq, rounding, plain operations": quantizer(phase=Phase.ROUND),
    }
    found: dict[str, tuple[Function, list[Tensor]]] = {
        name: (module, list(module.parameters())) for name, module in modules.items()
    }
    found |= {name: (_plain(module), list(module.parameters())) for name, module in plain.items()}
    return {name: pair for name, pair in found.items() if names is None or name in names}


def passes(function: Function, parameters: list[Tensor], x: Tensor, grad: Tensor) -> Pair:
    """Forward and backward of a function, each to be called again and again."""
    out = function(x)
    needed = [x, *(parameter for parameter in parameters if parameter.requires_grad)]
    back = partial(torch.autograd.grad, out, needed, grad, retain_graph=True, allow_unused=True)
    return partial(function, x), back


def kept_bytes(function: Function, x: Tensor) -> float:
    """Bytes an element that backward needs besides the function's result, which the layer behind keeps anyway."""
    return saved_bytes(lambda: function(x), result=False) / x.numel()


def measure(size: int, dtype: str, threads: int, rounds: int, names: Collection[str] | None = None) -> dict[str, Any]:
    """Functions on one tensor.

    Args:
        size: elements.
        dtype: of the tensor, a name of torch's.
        threads: that torch may use.
        rounds: samples of each.
        names: which functions; all if left out.

    Returns:
        Nanoseconds an element, ratios to a copy and an add, and bytes kept.
    """
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(size).to(kind).requires_grad_()
    grad, other = torch.randn(size).to(kind), torch.randn(size).to(kind)
    tasks: dict[str, Callable[[], object]] = {"copy": x.detach().clone, "add": partial(torch.add, grad, other)}
    notes, kept = [], {}
    with nullcontext() if threads > 1 else torch.autograd.set_multithreading_enabled(False):
        for name, (function, parameters) in functions(names).items():
            try:
                tasks[f"{name} | forward"], tasks[f"{name} | backward"] = passes(function, parameters, x, grad)
                kept[name] = round(kept_bytes(function, x), 1)
            except RuntimeError as error:
                tasks.pop(f"{name} | forward", None)
                notes.append(f"{name}: {str(error).splitlines()[0]}")
        samples = interleaved(tasks, rounds, threads=threads, least=LEAST)
    limit = total(samples["copy"], samples["add"])
    per_element = 1e9 / size
    rows = {
        name: {
            "forward": quartiles(samples[f"{name} | forward"]).times(per_element).rounded(),
            "backward": quartiles(samples[f"{name} | backward"]).times(per_element).rounded(),
            "ratio": ratio(total(samples[f"{name} | forward"], samples[f"{name} | backward"]), limit).rounded(),
            "kept": kept[name],
        }
        for name in kept
    }
    limits = {name: quartiles(samples[name]).times(per_element).rounded() for name in ("copy", "add")}
    return {"elements": size, "dtype": dtype, "threads": threads, "limit": limits, "rows": rows, "notes": notes}


def fixed_cost(rounds: int, names: Collection[str] | None = None) -> dict[str, list[float]]:
    """Microseconds of forward and backward on a tensor of 16 elements: what a call costs before its first element."""
    x, grad = torch.randn(TINY).requires_grad_(), torch.randn(TINY)

    def both(function: Function, parameters: list[Tensor]) -> None:
        needed = [x, *(parameter for parameter in parameters if parameter.requires_grad)]
        torch.autograd.grad(function(x), needed, grad, allow_unused=True)

    tasks = {name: partial(both, *pair) for name, pair in functions(names).items()}
    samples = interleaved(tasks, rounds, least=LEAST)
    return {name: quartiles(seconds).times(1e6).rounded() for name, seconds in samples.items()}


def main() -> None:
    """Measure and write."""
    options = record.parser(__doc__, "elements", 15)
    options.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    given = options.parse_args()
    record.refuse_existing(given.out, overwrite=given.overwrite)
    load, cases = record.load(), []
    for threads in given.threads:
        for dtype in TYPES:
            for size in SIZES:
                cases.append(measure(size, dtype, threads, given.rounds))
                ratios = {name: row["ratio"][1] for name, row in cases[-1]["rows"].items()}
                print(size, dtype, threads, cases[-1]["limit"], ratios, cases[-1]["notes"], flush=True)
    fixed = fixed_cost(given.rounds)
    print("microseconds a call:", {name: row[1] for name, row in fixed.items()})
    record.write(given.out, {**record.origin(load), "rounds": given.rounds, "cases": cases, "fixed": fixed})


if __name__ == "__main__":
    main()
