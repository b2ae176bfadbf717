"""Six novels as characters: five to learn from, the sixth never seen."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.tasks.cache import Arrays, stored
from nipq.errors import ConfigError, require
from nipq.train.batches import Sources, tensor_splits

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

FOLDER = "janeaustenr/data"
NOVELS_HELP = (
    "Give the folder (data.path, --data) below which Debian's r-cran-janeaustenr is unpacked "
    "(`apt-get download r-cran-janeaustenr`, then `dpkg-deb -x`). docs/results/tasks.md has the commands"
)
LEARNED = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey")
UNSEEN = "persuasion"
#: Characters of a window; the model predicts each from those before it in the window.
LENGTH = 128
#: Windows of the unseen novel that are scored, from its start.
TEST = 1200
#: Characters of the model; the rarest of the novels share the first.
VOCABULARY = 72


def characters(config: DataConfig, seed: int) -> Sources:
    """Windows of text, and the same moved on by one character.

    Args:
        config: The ``data`` section; ``path`` is the folder of the novels.
        seed: Decides which windows are held out, and which ``train_limit`` keeps.

    Returns:
        Inputs and targets [N, 128] int64, below 72. Training and validation windows come from five novels, test windows
        from the sixth.

    Raises:
        ConfigError: If the novels are missing.
    """
    arrays = stored(config.path, "novels", (LENGTH, VOCABULARY), lambda: encoded(novels(config.path)))
    learned, unseen = (torch.from_numpy(arrays[name]).long() for name in ("learned", "unseen"))

    def pairs(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    return tensor_splits(pairs(learned), pairs(unseen[:TEST]), config, seed)


def encoded(texts: dict[str, str]) -> Arrays:
    """Texts as windows of character numbers.

    Args:
        texts: Text by name; the most frequent characters of :data:`LEARNED` get numbers from 1 on, the others 0.

    Returns:
        ``learned`` and ``unseen``, each [N, 129] uint8; neighbouring windows share one character.
    """
    whole = "\n".join(texts[name] for name in LEARNED)
    letters, counts = np.unique(np.array(list(whole)), return_counts=True)
    order = np.lexsort((letters, -counts))[: VOCABULARY - 1]
    number = {str(letters[place]): rank + 1 for rank, place in enumerate(order)}

    def windows(text: str) -> np.ndarray[Any, Any]:
        codes = np.array([number.get(letter, 0) for letter in text], np.uint8)
        starts = np.arange(0, len(codes) - LENGTH, LENGTH)
        return codes[starts[:, None] + np.arange(LENGTH + 1)]

    return {"learned": windows(whole), "unseen": windows(texts[UNSEEN])}


def novels(folder: str | Path | None) -> dict[str, str]:
    """The novels by name, lines ended by newlines.

    Args:
        folder: Where the package lies, in any subfolder.

    Returns:
        Six texts.

    Raises:
        ConfigError: If the package is missing or damaged.
        MissingDependencyError: If the rdata package is not installed.
    """
    found = [] if folder is None else [path for path in sorted(Path(folder).rglob(FOLDER)) if path.is_dir()]
    if not found:
        raise ConfigError(f"expected the folder {FOLDER} below {folder}, found none. {NOVELS_HELP}")
    rdata = require("rdata", extra="tasks", purpose="reading the novels, which are a package of R")

    def value(data: bytes) -> Any:  # noqa: ANN401 - whatever R stored
        return rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))

    try:
        variables = value((found[0] / "Rdata.rdx").read_bytes())["variables"]
        store = (found[0] / "Rdata.rdb").read_bytes()
        texts = {}
        for name in (*LEARNED, UNSEEN):
            start, length = map(int, variables[name])
            # R keeps each object as its length in four bytes, then a zlib stream.
            texts[name] = "\n".join(map(str, value(zlib.decompress(store[start + 4 : start + length]))))
    # NotImplementedError is how rdata says that it does not know a format.
    except (OSError, KeyError, ValueError, NotImplementedError, zlib.error) as error:
        raise ConfigError(f"expected six novels in {found[0]}: {error!r}. {NOVELS_HELP}") from error
    return texts
