"""ZIP archives as data: members in memory, never on the disk, and never longer than the file itself."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from nipq.errors import FileFormatError

#: Times the promised size that a file may have before it is refused unread.
TIMES_PROMISED = 4
#: Bytes that a small file may have anyhow.
ANYHOW = 2**20


def members(data: bytes, path: Path) -> dict[str, bytes]:
    """What an archive holds.

    Args:
        data: the archive.
        path: where from, for messages.

    Returns:
        Contents by name.

    Raises:
        FileFormatError: if it is damaged, compressed, or claims to hold more than it is long.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not plain or sum(entry.file_size for entry in entries) > len(data):
                raise FileFormatError(
                    f"{path}: expected an archive that is stored as it is, found a compressed or overlapping one. "
                    "Export the model again."
                )
            found = {entry.filename: archive.read(entry) for entry in entries}
    except FileFormatError:
        raise
    except Exception as error:  # the module answers damage with many kinds of error
        raise FileFormatError(
            f"{path}: expected a whole archive, found: {error}. Export or copy the model again."
        ) from error
    if len(found) < len(entries):
        raise FileFormatError(f"{path}: expected every name once, found some twice. Export the model again.")
    return found


def read(path: Path, promised: int) -> bytes:
    """A file that is not far longer than it should be.

    Args:
        path: the file.
        promised: bytes that it should have.

    Returns:
        Its bytes.

    Raises:
        FileFormatError: if it is missing or too long.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a file, found none. Check the path.")
    longest = TIMES_PROMISED * promised + ANYHOW
    if path.stat().st_size > longest:
        raise FileFormatError(f"{path}: expected about {promised:,} bytes, found {path.stat().st_size:,}.")
    return path.read_bytes()
