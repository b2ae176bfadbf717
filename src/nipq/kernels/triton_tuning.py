"""Tuning of the Triton kernels: the search for sizes that suit a GPU, ``nipq doctor --tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nipq.errors import MissingDependencyError
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.triton import proxy_backward, proxy_forward
from nipq.kernels.triton_tiles import ALLOWED, Sizes, keep_sizes, on_trial

#: Shapes that are timed: activations of half a batch in half precision with one clipping range, weights with many.
ACTIVATIONS, WEIGHTS = (64, 256, 56, 56), (1024, 512, 3, 3)

try:
    import triton
except ImportError:
    triton = None

Stopwatch = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Tuned:
    """Result of a search.

    Attributes:
        gpu: name of the GPU.
        sizes: the fastest.
        usual: milliseconds with the sizes that are used without a search, for activations and for weights.
        found: the same with the fastest.
        file: where they are kept.
    """

    gpu: str
    sizes: Sizes
    usual: tuple[float, float]
    found: tuple[float, float]
    file: Path

    def __str__(self) -> str:
        """The result in one line."""
        was, now = sum(self.usual), sum(self.found)
        return f"{self.gpu}: {self.sizes}, {now:.3f} ms where the usual sizes take {was:.3f}; kept in {self.file}"


def tune() -> Tuned:
    """Find and keep the sizes for the present GPU; most of the time is compiling.

    Returns:
        The sizes, and what they save.

    Raises:
        MissingDependencyError: if there is no GPU, or no Triton.
    """
    if triton is None or not torch.cuda.is_available():
        raise MissingDependencyError(
            "nipq doctor --tune: expected an NVIDIA GPU and Triton, found none; the kernels for CPUs need no tuning."
        )
    gpu = torch.cuda.get_device_name()
    steps = (proxy_step(ACTIVATIONS, torch.bfloat16, 1, "cuda"), proxy_step(WEIGHTS, torch.float32, WEIGHTS[0], "cuda"))
    sizes, usual, found = search(steps, triton.testing.do_bench)
    return Tuned(gpu, sizes, usual, found, keep_sizes(gpu, sizes))


def search(
    steps: tuple[Callable[[], object], Callable[[], object]], milliseconds: Stopwatch
) -> tuple[Sizes, tuple[float, float], tuple[float, float]]:
    """Search one size after the other, each at its best value so far: 12 timings instead of 375.

    Args:
        steps: work with one clipping range, and with several.
        milliseconds: how long one of them takes.

    Returns:
        The fastest sizes by the sum of both times, the times of the usual sizes, and theirs.
    """

    def times(sizes: Sizes) -> tuple[float, float]:
        with on_trial(sizes):
            return milliseconds(steps[0]), milliseconds(steps[1])

    best = Sizes()
    usual = least = times(best)
    for sizes in _variations():
        candidate = replace(best, **sizes)
        if candidate == best:
            continue
        taken = times(candidate)
        if sum(taken) < sum(least):
            best, least = candidate, taken
    return best, usual, least


def _variations() -> Iterator[dict[str, int]]:
    for warps in ALLOWED["warps"]:  # a tile suits a number of threads, so these two go together
        for tile in ALLOWED["tile"]:
            if 128 <= tile // warps <= 512:
                yield {"warps": warps, "tile": tile}
    for name in ("programs", "programs_per_channel"):
        for count in ALLOWED[name]:
            yield {name: count}


def proxy_step(
    shape: tuple[int, ...], dtype: torch.dtype, channels: int, device: str
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the proxy on random numbers.

    Args:
        shape: of what is quantized.
        dtype: its type.
        channels: number of clipping ranges, along the first axis.
        device: where.

    Returns:
        Does it once, and returns result and gradients.
    """
    x = torch.randn(shape, device=device).to(dtype)
    grad = torch.randn_like(x)
    alpha_raw, bit_raw = torch.ones(channels, device=device), torch.zeros(1, device=device)
    tensors = ProxyTensors(alpha_raw, draw_key(device), bit_raw=bit_raw)
    settings = ProxySettings(SIGNED, 2.0, 8.0, (2, 3, 4, 5, 6, 7, 8), stochastic=True)

    def run() -> tuple[Tensor, ...]:
        y = proxy_forward(x, tensors, settings)
        dx, d_alpha, _ = proxy_backward(grad, y, tensors, settings)
        return y, dx, d_alpha

    return run
