"""The outside of a packed file: that it is whole, of this format, unchanged, and no larger than the model warrants.

A file may come from anywhere, so nothing is believed before it is checked, and nothing is read that a file of the given
architecture could not need: a header or a payload that is too long is refused by its length alone.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export.packed_write import FORMAT, FORMAT_VERSION, KEY, checksum

#: Bytes of the header: so many anyhow, and so many for each tensor of the model. It needs about 0.5 kB for a layer.
HEADER_ANYHOW, HEADER_PER_TENSOR = 2**16, 2**12
#: Bytes of payload for each element of the model's state: a weight of 16 bits, a scale, an offset and a step for each
#: channel come to less, and so does a float64.
PAYLOAD_PER_ELEMENT = 16
#: The version before files had a checksum; they are read all the same.
WITHOUT_CHECKSUM = 1


@dataclass(frozen=True)
class Container:
    """What a packed file holds, whole and unchanged but not yet understood.

    Attributes:
        version: of the format.
        layers: the metadata's records of layers, in whatever form.
        products: likewise, of products inside attention; None where there are none.
        tensors: by name.
    """

    version: int
    layers: Any
    products: Any
    tensors: dict[str, Tensor]


def read_container(path: Path, model: nn.Module) -> Container:
    """Read a packed file as far as its form goes.

    Args:
        path: the file.
        model: the architecture, for how long a header and a payload it may have.

    Returns:
        What is in it.

    Raises:
        FileFormatError: if it is missing, no whole safetensors file, longer than one of this model can be, of another
            format or version, or not what was written.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a packed model file, found none. Check the path.")
    state = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    longest_header = HEADER_ANYHOW + HEADER_PER_TENSOR * len(state)
    longest = 8 + longest_header + PAYLOAD_PER_ELEMENT * sum(value.numel() for value in state)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > longest_header:
                raise FileFormatError(
                    f"{path}: expected a whole safetensors file with a header of at most {longest_header:,} bytes for "
                    f"this {type(model).__name__}, found {length:,}. Save or copy the model again."
                )
            header = file.read(length)
            about = _metadata(path, json.loads(header))  # of a foreign file nothing but the header is read
            data = start + header + file.read(longest - 8 - len(header) + 1)
        if len(data) > longest:
            raise FileFormatError(
                f"{path}: expected at most {longest:,} bytes for this {type(model).__name__}, found more. "
                "Give the architecture that was saved."
            )
        tensors = tensors_of(data)
    except FileFormatError:
        raise
    except (SafetensorError, struct.error, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected a whole safetensors file, found: {error}. Save or copy the model again."
        ) from error
    if about["version"] != WITHOUT_CHECKSUM:
        _check_sum(path, data, len(header), about.get("sha256"))
    return Container(about["version"], about.get("layers"), about.get("products"), tensors)


def _metadata(path: Path, header: object) -> dict[str, Any]:
    """What the file says of itself, of a version that can be read."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    try:
        about = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: metadata: expected JSON, found {error}. Save or copy the model again."
        ) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: expected a file of format {FORMAT!r}, found another one. Only what nipq.save wrote can be loaded."
        )
    if about.get("version") not in (WITHOUT_CHECKSUM, FORMAT_VERSION):
        raise FileFormatError(
            f"{path}: expected format version {FORMAT_VERSION}, found {about.get('version')!r}. "
            f"Use the release of nipq that wrote it ({about.get('nipq')})."
        )
    return about


def _check_sum(path: Path, data: bytes, header: int, stated: object) -> None:
    """Refuse a file that was changed since it was written."""
    place = -1
    if isinstance(stated, str) and re.fullmatch("[0-9a-f]{64}", stated):
        place = data.find(stated.encode(), 8, 8 + header)
    if place < 0 or checksum(data, place) != stated:
        raise FileFormatError(
            f"{path}: expected a file with the checksum that it states, found another one: it was changed or damaged "
            "since it was written. Save or copy the model again."
        )
