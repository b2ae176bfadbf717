"""What the tests of the text tasks share: a data section, and a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.tasks import snippets
from nipq.train.config import DataConfig


def section(folder: Path | None, **fields: object) -> DataConfig:
    settings = {"kind": "custom", "factory": "x:y", "path": folder and str(folder), "batch_size": 8}
    return DataConfig.model_validate(settings | fields)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer where MiniLM's would be; padding has number 0, words that it does not know 1.

    Args:
        folder: of the data.
        words: numbered from 2 on.
    """
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    place = folder / "other" / snippets.MODEL
    place.mkdir(parents=True)
    tokenizer.save(str(place / "tokenizer.json"))
