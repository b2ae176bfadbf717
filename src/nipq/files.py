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
    """Absolute path of the folder for files that were compiled or measured on this machine; it may not exist.

    Variables that are empty count as not set, and a relative ``XDG_CACHE_HOME`` too, as its specification says.

    Raises:
        ConfigError: if no variable names a folder, and the user has no home.
    """
    named, base = os.environ.get(CACHE, ""), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named:
            return Path(named).expanduser().absolute()
        if Path(base).is_absolute():
            return Path(base) / "nipq"
        if "HOME" in os.environ and not os.environ["HOME"]:
            raise RuntimeError("HOME is empty")
        return Path.home().absolute() / ".cache" / "nipq"
    except RuntimeError as error:
        raise ConfigError(
            f"expected a folder for the cache, found no home folder: {str(error).rstrip('.')}. "
            f"Set {CACHE} to a folder of your own"
        ) from error


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
