"""Files that appear whole or not at all, and replace nothing unless told to."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from nipq.errors import ConfigError


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is taken, or whose folder does not exist.

    Args:
        path: where a file is to be.
        overwrite: whether an existing file may be replaced.

    Raises:
        ConfigError: if it may not be written.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = (
            "Choose another one."
            if path.is_dir()
            else "Choose another one, or pass overwrite=True (--overwrite) to replace it."
        )
        what = "folder" if path.is_dir() else "file"
        raise ConfigError(f"export: expected a name that is free, found the {what} {path}. {remedy}")
    if not path.parent.is_dir():
        raise ConfigError(f"export: expected the folder {path.parent} to exist, found none. Create it first.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it.

    Args:
        path: the file; replaced if it exists.
        data: its contents.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
