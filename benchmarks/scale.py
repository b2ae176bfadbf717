"""Cost of bits, clipping ranges, penalty and freeze as models grow: memory, messages, time, on chains of layers.

python -m benchmarks.scale --overwrite        # results/scale.jsonl, in about two minutes; starts two processes

Everything here is counted or timed on one machine; docs/internals/scale.md extrapolates to 7 billion weights on 64
GPUs.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

import nipq
from benchmarks import record
from benchmarks.timing import interleaved, quartiles
from nipq.distributed.fsdp import quantizer_parameters, shard_
from nipq.prepare.layer_table import quantizers
from nipq.qat.search import Search

COUNTS = (20, 100, 400, 1600)
"""Numbers of quantizers: two for each layer."""
WIDTH, BATCH = 16, 2
BUDGET = nipq.AverageBits(weights=4, activations=4)


def chain(layers: int) -> nn.Sequential:
    """Linear layers that keep the size of what passes."""
    linear = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*linear)


def prepared(layers: int) -> nn.Sequential:
    """The chain with quantizers, calibrated."""
    torch.manual_seed(0)
    model = chain(layers)
    x = torch.randn(64, WIDTH)
    nipq.prepare_(model, x[:1], nipq.Config())
    return nipq.calibrate_(model, [x], batches=1).train()


# ---------------------------------------------------------------------- memory


def memory(layers: int) -> dict[str, int]:
    """Bytes that quantizers add: on the device with Adam, of the process for Python objects, and while bits freeze."""
    model = prepared(layers)
    optimizer = torch.optim.Adam(nipq.param_groups(model, lr=1e-6))
    search = Search(model, BUDGET, 100)
    (model(torch.randn(BATCH, WIDTH)).square().mean() + search.penalty()).backward()
    optimizer.step()
    own = quantizer_parameters(model)
    states = [value for p in own for value in optimizer.state[p].values() if value.numel() == p.numel() and value.ndim]
    buffers = [buffer for quantizer in quantizers(model) for buffer in quantizer.buffers()]
    host, plain_host = _python_bytes(model), _python_bytes(chain(layers))
    free = spread_out(layers)
    tracemalloc.start()
    nipq.freeze_bits_(free, BUDGET)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "parameters": _bytes(own),
        "gradients": _bytes([p.grad for p in own if p.grad is not None]),
        "adam": _bytes(states),
        "buffers": _bytes(buffers),
        "python": host - plain_host,
        "snap": peak,
    }


def _python_bytes(model: nn.Module) -> int:
    """Bytes of the Python objects of a copy; the least of three, as other threads may allocate meanwhile."""
    found = []
    for _ in range(3):
        tracemalloc.start()
        twin = copy.deepcopy(model)
        found.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del twin
    return min(found)


def saved(layers: int) -> dict[str, int]:
    """Bytes that autograd keeps for backward besides parameters, by variant."""
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    models = {"float": chain(layers), "quantized": prepared(layers)}
    kept = {name: _kept(model, lambda m=model: m(x)) for name, model in models.items()}
    segments = max(1, layers // 10)
    kept["quantized, blocks of ten recomputed"] = _kept(
        models["quantized"],
        lambda: checkpoint_sequential(models["quantized"], segments, x, use_reentrant=False),  # type: ignore[no-untyped-call]  # as torch has it
    )
    return kept


def _kept(model: nn.Module, run: Any) -> int:  # noqa: ANN401
    own = {parameter.data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    total = sum(seen.values())
    del result
    return total


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---------------------------------------------------------------------- time


def seconds(layers: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of what is done for all quantizers together: quartiles."""
    model = prepared(layers)
    search = Search(model, BUDGET, 10_000)
    tasks = {
        "penalty + backward": lambda: search.penalty().backward(),  # type: ignore[no-untyped-call]  # torch gives it no type
        "search.step": search.step,
        "freeze_bits_": lambda: nipq.freeze_bits_(spread_out(layers), BUDGET),
        "model to be frozen": lambda: spread_out(layers),
    }
    found = {name: quartiles(s).times(1e6).rounded() for name, s in interleaved(tasks, rounds, least=0.01).items()}
    made = found.pop("model to be frozen")[1]
    found["freeze_bits_"] = [round(max(value - made, 0.0), 1) for value in found["freeze_bits_"]]
    return found


_TEMPLATES: dict[int, nn.Module] = {}


def spread_out(layers: int) -> nn.Module:
    """A fresh copy of the prepared chain with bit-widths all over their range, as a search may leave them."""
    if layers not in _TEMPLATES:
        model = prepared(layers)
        with torch.no_grad():
            for quantizer in quantizers(model):
                if not quantizer.is_frozen:
                    quantizer.bit_raw.normal_()
        _TEMPLATES[layers] = model
    return copy.deepcopy(_TEMPLATES[layers])


# ---------------------------------------------------------------------- messages


def messages(layers: int) -> dict[str, dict[str, int]]:
    """Bytes and number of messages that a rank gives to be reduced in one step, and says at the freeze."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, str(Path(folder) / "group"), layers, there)) for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        there.close()
        found: dict[str, dict[str, int]] = here.recv()
        for process in ranks:
            process.join()
    return found


def _rank(rank: int, place: str, layers: int, pipe: Any) -> None:  # noqa: ANN401
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **keywords)

    def bucket_sent(_state, bucket):  # noqa: ANN001, ANN202 -- DDP wants types as objects, not as text
        buffer = bucket.buffer()
        sent.append(buffer.numel() * buffer.element_size())
        work = reduce(buffer.div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def counts() -> dict[str, int]:
        total = {"bytes": sum(sent), "messages": len(sent)}
        sent.clear()
        return total

    def told(call: Any, place: int) -> Any:  # noqa: ANN401
        def say(*args: Any, **keywords: Any) -> Any:  # noqa: ANN401
            sent.append(len(pickle.dumps(args[place])))
            return call(*args, **keywords)

        return say

    dist.all_reduce = counted
    dist.all_gather_object, dist.broadcast_object_list = (
        told(dist.all_gather_object, 1), told(dist.broadcast_object_list, 0)
    )  # fmt: skip
    found, x = {}, torch.randn(BATCH, WIDTH)
    for name, model in (("DDP, float", chain(layers)), ("DDP", prepared(layers))):
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, bucket_sent)
        for _ in range(2):  # buckets are arranged anew after the first step
            sent.clear()
            wrapped(x).square().mean().backward()
        found[name] = counts()
    model = prepared(layers)
    shard_(model)
    search = Search(model, BUDGET, 100)
    sent.clear()
    model(x).square().mean().backward()
    found["FSDP, quantizers"] = counts()
    search.penalty()
    search.step()
    found["penalty and search.step"] = counts()
    nipq.freeze_bits_(model, BUDGET)
    found["freeze_bits_"] = counts()
    if rank == 0:
        pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------- all of it


def line(points: dict[str, float]) -> dict[str, float]:
    """Least squares a + b n through values by number of quantizers.

    Args:
        points: number of quantizers -> value.

    Returns:
        ``fixed`` (a), ``each`` (b) and ``largest relative error`` of the line at the points.
    """
    n, y = np.array([float(count) for count in points]), np.array(list(points.values()), dtype=float)
    weights = 1 / np.maximum(y, 1e-12)  # relative errors count alike, at 20 quantizers as at 1,600
    design = np.stack([np.ones_like(n), n], 1)
    (fixed, each), *_ = np.linalg.lstsq(design * weights[:, None], y * weights, rcond=None)
    worst = float(np.max(np.abs(fixed + each * n - y) * weights))
    return {"fixed": float(fixed), "each": float(each), "largest relative error": round(worst, 3)}


def main() -> None:
    """Measure and write."""
    given = record.parser(__doc__, "scale", 7, counts=COUNTS).parse_args()
    record.refuse_existing(given.out, overwrite=given.overwrite)
    load, measured = record.load(), {}
    for count in given.counts:
        layers = count // 2
        measured[str(count)] = {
            "memory": memory(layers), "saved": saved(layers), "microseconds": seconds(layers, given.rounds),
            "messages": messages(layers),
        }  # fmt: skip
        print(count, measured[str(count)], flush=True)
    lines = {
        part: line({count: found["microseconds"][part][1] for count, found in measured.items()})
        for part in next(iter(measured.values()))["microseconds"]
    }
    settings = {"width": WIDTH, "batch": BATCH, "rounds": given.rounds}
    record.write(given.out, {**record.origin(load), **settings, "measured": measured, "lines": lines})


if __name__ == "__main__":
    main()
