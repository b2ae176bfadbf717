"""Atomic writing of files, checks that nothing is overwritten by accident, and the cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from nipq.errors import ConfigError

#: Set to a folder for what was compiled or measured; else it goes where the platform keeps caches.
CACHE = "NIPQ_CACHE"


def cache_folder() -> Path:
    """Folder of the files that were compiled or measured on this machine."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nipq"


def check_free(path: Path, *, overwrite: bool, command: str) -> None:
    """Refuse a name that is taken, or whose folder does not exist.

    Args:
        path: where a file is to be.
        overwrite: whether an existing file may be replaced.
        command: who asks, for the message.

    Raises:
        ConfigError: if it may not be written.
    """
    if path.is_dir():
        raise ConfigError(f"{command}: expected a name that is free, found the folder {path}. Choose another one.")
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{command}: expected a name that is free, found the file {path}. "
            "Choose another one, or pass overwrite=True (--overwrite) to replace it."
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{command}: expected the folder {path.parent} to exist, found none. Create it first.")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: to a temporary one beside it, which replaces it at the end, so a kill leaves either.

    Args:
        path: the file; replaced if it exists.

    Yields:
        Where to write; what is there is on the disk before it takes the name. Nothing is left of it after an error.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
