"""The command that each network with published weights has: from the package's folder to a file that a config names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nipq.errors import ConfigError


def write_weights(description: str | None, name: str, hint: str, convert: Callable[[Path], dict[str, Tensor]]) -> None:
    """Read the two paths of the command line and write the converted weights.

    Args:
        description: Of the command.
        name: Path of the published file below the package's folder.
        hint: How to get it.
        convert: From that file to a state dict of the network.

    Raises:
        SystemExit: If the file is missing, or holds something else.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="below it lies the unpacked package")
    parser.add_argument("file", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    found = sorted(arguments.folder.rglob(name))
    if not found:
        raise SystemExit(f"expected {name} below {arguments.folder}, found none. {hint}")
    try:
        state = convert(found[0])
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, arguments.file)
