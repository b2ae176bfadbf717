"""Tiling of a tensor for the Triton kernels, by its size and layout and by sizes that suit the GPU.

The sizes change no value of a result, and of the sums in a gradient only the order. So they are not looked for while
training: ``nipq doctor --tune`` measures once (``nipq.kernels.triton_tuning``), what it found is kept in the cache
folder, and every run on that machine then has the same ones, and the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nipq.errors import ConfigError, FileFormatError
from nipq.files import cache_folder, written_whole


@dataclass(frozen=True)
class Sizes:
    """Sizes that may be chosen for a GPU.

    Attributes:
        tile: elements of a tile, a power of two; 1,024 are 8 a thread, one load of 16 bytes in half precision.
        programs: of a launch with one clipping range, about. Each takes several tiles in a row, so that its scalars in
            float64 and its sums cost little.
        programs_per_channel: the same with several clipping ranges.
        warps: threads / 32 of a program.
    """

    tile: int = 1024
    programs: int = 4096
    programs_per_channel: int = 1024
    warps: int = 4


#: Values that each of :class:`Sizes` may have; a file with others is not one of ours.
ALLOWED = {
    "tile": (256, 512, 1024, 2048, 4096),
    "programs": (1024, 2048, 4096, 8192, 16384),
    "programs_per_channel": (256, 512, 1024, 2048, 4096),
    "warps": (2, 4, 8),
}


@dataclass(frozen=True)
class Tiling:
    """A dense tensor in the order of memory, seen as (rows, channels, inner), and how it is cut.

    Attributes:
        size: the three lengths; element (r, c, i) lies at place (r channels + c) inner + i and has clipping range c.
        shape: of a tile, powers of two.
        tiles: of one group of channels, a group being as many as a tile has.
        tiles_inner: tiles side by side in a row.
        share: tiles that one program takes, one after the other.
        chunks: programs of one group.
        groups: how many.
        warps: threads / 32 of a program.
    """

    size: tuple[int, int, int]
    shape: tuple[int, int, int]
    tiles: int
    tiles_inner: int
    share: int
    chunks: int
    groups: int
    warps: int

    @property
    def grid(self) -> tuple[int]:
        """Number of programs to launch."""
        return (self.chunks * self.groups,)

    @property
    def options(self) -> dict[str, Any]:
        """Options of every launch: threads, and a multiply and an add that round twice, as in torch."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    @property
    def arguments(self) -> dict[str, int]:
        """Arguments of a kernel that goes over the elements."""
        names = ("rows", "channels", "inner", "tile_rows", "tile_channels", "tile_inner")
        return dict(zip(names, self.size + self.shape, strict=True)) | {
            "tiles": self.tiles, "tiles_inner": self.tiles_inner, "share": self.share, "chunks": self.chunks,
        }  # fmt: skip

    @property
    def sum_arguments(self) -> dict[str, int]:
        """Arguments of a kernel that adds up the sums of the programs."""
        channels = min(_power(self.size[1]), 128)
        return {
            "channels": self.size[1], "chunks": self.chunks,
            "tile_channels": channels, "tile_chunks": min(_power(self.chunks), 1024 // channels),
        }  # fmt: skip


def tiling(x: Tensor, channels: int, channel_axis: int) -> Tiling:
    """Tiling of a tensor.

    Args:
        x: dense.
        channels: number of clipping ranges.
        channel_axis: their axis.

    Raises:
        FileFormatError: if the sizes kept for this GPU are not ones that can be.
    """
    inner = x.numel() if channels == 1 else x.stride(channel_axis)
    return _tiling(x.numel() // max(channels * inner, 1), channels, inner, sizes_for(x.device))


@lru_cache(4096)
def _tiling(rows: int, channels: int, inner: int, sizes: Sizes) -> Tiling:
    if channels == 1:
        shape = (1, 1, sizes.tile)
    else:  # a few rows at least, so that a channel's scalars are not computed for every element; then what fits
        tile_inner = min(_power(inner), sizes.tile // 2)
        tile_rows = min(_power(rows), max(1, 32 // tile_inner))
        tile_channels = min(_power(channels), sizes.tile // (tile_inner * tile_rows))
        shape = (min(_power(rows), sizes.tile // (tile_inner * tile_channels)), tile_channels, tile_inner)
    tiles_inner, groups = _parts(inner, shape[2]), _parts(channels, shape[1])
    tiles = _parts(rows, shape[0]) * tiles_inner
    share = max(1, _parts(tiles * groups, sizes.programs if channels == 1 else sizes.programs_per_channel))
    return Tiling((rows, channels, inner), shape, tiles, tiles_inner, share, _parts(tiles, share), groups, sizes.warps)


# ------------------------------------------------------------------------------------------- which sizes

_on_trial: Sizes | None = None


@contextmanager
def on_trial(sizes: Sizes) -> Iterator[None]:
    """Cut every tensor by some sizes, on any device.

    Args:
        sizes: which.
    """
    global _on_trial  # launches are many calls below whoever compares sizes
    before, _on_trial = _on_trial, sizes
    try:
        yield
    finally:
        _on_trial = before


def sizes_for(device: torch.device) -> Sizes:
    """Sizes by which tensors of a device are cut.

    Args:
        device: a GPU, or the CPU for Triton's interpreter.

    Raises:
        FileFormatError: if the sizes kept for this GPU are not ones that can be.
    """
    if _on_trial is not None:
        return _on_trial
    return kept_sizes(device.index) if device.type == "cuda" else Sizes()


@cache
def kept_sizes(device: int) -> Sizes:
    """The sizes found for a GPU, or the usual ones where none were looked for.

    Args:
        device: its number.

    Raises:
        FileFormatError: if the file holds anything else.
    """
    try:
        path = sizes_file(torch.cuda.get_device_name(device))
        return read_sizes(path) if path.is_file() else Sizes()
    except (ConfigError, PermissionError):  # no home, or one that cannot be read
        return Sizes()


def sizes_file(gpu: str) -> Path:
    """File of the sizes for a kind of GPU.

    Args:
        gpu: its name, as torch gives it.
    """
    return cache_folder() / f"sizes-{hashlib.sha256(gpu.encode()).hexdigest()[:24]}.json"


def read_sizes(path: Path) -> Sizes:
    """Sizes from a file of :func:`keep_sizes`.

    Args:
        path: the file.

    Raises:
        FileFormatError: if it is damaged, or from elsewhere.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sizes"]
        if all(found[name] in values for name, values in ALLOWED.items()):
            return Sizes(**found)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise FileFormatError(
        f"{path}: expected sizes of GPU kernels as nipq doctor --tune writes them, found something else. "
        "Delete the file."
    )


def keep_sizes(gpu: str, sizes: Sizes) -> Path:
    """Write sizes where :func:`kept_sizes` finds them; those of an earlier search are replaced.

    Args:
        gpu: name of the GPU.
        sizes: what was found.

    Returns:
        The file.
    """
    path = sizes_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({"gpu": gpu, "sizes": asdict(sizes)}, indent=2) + "\n", encoding="utf-8")
    kept_sizes.cache_clear()
    return path


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
