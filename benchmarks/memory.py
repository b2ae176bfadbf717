"""Memory of a training step: what autograd keeps for backward, and how far the process grows."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor] = (), *, result: bool = True) -> int:
    """Bytes that autograd keeps between forward and backward, each stretch of memory once.

    Args:
        forward: computes something, and returns it so that its graph is still there when it is counted.
        without: tensors that would be there anyway, such as parameters.
        result: whether what it returns counts where it is kept; the function behind may keep it anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    if not result:
        found.pop(out.untyped_storage().data_ptr(), None)
    return sum(found.values())


def peak_growth(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of the process grows within a call, on Linux; else None.

    Args:
        step: what to call; call it before, so that what stays does not count.
    """
    if not _CLEAR.exists():
        return None
    gc.collect()
    give_back()
    try:
        _CLEAR.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def give_back() -> None:
    """Let the allocator return what it holds for later, where it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
