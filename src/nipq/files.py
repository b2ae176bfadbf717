"""Atomic writing of files, strict JSON, checksums, locks, checks that nothing is overwritten, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from nipq.errors import ConfigError, FileFormatError, first_line

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


#: What stands before the checksum at the end of a sealed file; its digits follow.
SEAL = b"nipq-sha256:"


def seal(path: Path) -> None:
    """Add the SHA-256 of a file at its end, where readers of ZIP archives, as torch's, pass it by."""
    digest = sha256_of(path)
    with path.open("ab") as file:
        file.write(SEAL + digest.encode())
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: Path) -> None:
    """Refuse a file that was changed since :func:`seal`.

    Raises:
        FileFormatError: if it has no checksum at its end, or another one than its bytes.
    """
    length = len(SEAL) + 64
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - length
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        end = file.read(length)
    if end != SEAL + digest.hexdigest().encode():
        raise FileFormatError(
            f"expected {path} as it was written, found that its checksum is missing or another one: it was damaged or "
            "changed since; restore the file or start a new folder"
        )


# ---------------------------------------------------------------------- JSON


def json_text(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:  # noqa: ANN401
    """JSON that every reader takes: numbers that are not finite become ``null``, and in a mapping a reason beside it.

    Args:
        value: plain values.
        indent: see ``json.dumps``.
        ensure_ascii: see ``json.dumps``.

    Example:
        >>> json_text({"db": -math.inf, "bits": [2.0, math.nan]})
        '{"db": null, "db_reason": "-inf", "bits": [2.0, null]}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - plain values
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, item in value.items():
            found[key] = _finite(item)
            if isinstance(item, float) and not math.isfinite(item):
                found[f"{key}_reason"] = str(float(item))
        return found
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str, place: str) -> Any:  # noqa: ANN401 - whatever the JSON holds
    """Read strict JSON: no NaN, no infinity, no key twice.

    Args:
        text: the JSON.
        place: name of its file, for the message.

    Raises:
        FileFormatError: if it is something else.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"expected JSON in {place}, found something else ({first_line(error)}); restore it"
        ) from error


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the JSON holds
    """Read a file of strict JSON; FileFormatError if it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"expected JSON in {path}, found something else ({error}); restore it") from error
    return parse_json(text, str(path))


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


# ---------------------------------------------------------------------- locks


@contextmanager
def locked(path: Path, *, alone: str | None = None) -> Iterator[None]:
    """Hold a lock that the system lifts when the process ends, however it ends.

    Args:
        path: the lock's file; created, never removed.
        alone: work that only one process may do, for the error; where left out, wait for the other process.

    Raises:
        ConfigError: if another process holds the lock, and ``alone`` is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if alone else msvcrt.LK_LOCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_EX)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise ConfigError(
                f"expected to be the only process that {alone or 'writes here'}, found {holder}, which holds {path}; "
                "wait for it or stop it"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
