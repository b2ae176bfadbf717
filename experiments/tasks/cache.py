"""Arrays that are made once and then read from a file beside the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


def stored(folder: str | Path | None, name: str, recipe: object, make: Callable[[], Arrays]) -> Arrays:
    """Make arrays, or read what was made by the same recipe.

    The file's name holds a digest of the recipe, so another recipe never reads it. It is written whole or not at all;
    two processes that make it at once write the same. A folder that cannot be written is used without a file.

    Args:
        folder: Where the data lie; ``None`` makes the arrays without a file.
        name: First part of the file's name.
        recipe: All that the arrays depend on besides the data; anything whose ``repr`` says it all.
        make: Makes the arrays.

    Returns:
        Arrays by name.
    """
    if folder is None:
        return make()
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    file = Path(folder) / f"{name}-{digest}.npz"
    if file.is_file():
        with np.load(file) as found:
            return dict(found)
    arrays = make()
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy reads them as allow_pickle
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
    return arrays
