from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import pytest
from torch import Tensor

from experiments.tasks import snippets
from experiments.tasks.snippets import rating
from nipq.train.batches import Sources, TensorSplit
from tests.experiments.texts import section, write_tokenizer

WORDS = ["good", "bad", "plain", "film", "plot", "cast", "it", "is", "and", "never"]


def write_snippets(folder: Path, rows: list[tuple[float, str]]) -> Path:
    text = "".join(f"{number}\t{rating}\t{text} \n" for number, (rating, text) in enumerate(rows)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / snippets.ARCHIVE, "w:gz") as archive:
        for name in (f"deep/{snippets.TABLE}", "deep/tweets_GroundTruth.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return folder


def made_up(count: int) -> list[tuple[float, str]]:
    """Snippets of two words each; all that say "good" are rated 2, "bad" -1.5, "plain" 0."""
    ratings = {"good": 2.0, "bad": -1.5, "plain": 0.0}
    return [(ratings[WORDS[n % 3]], f"{WORDS[n % 3]} {WORDS[3 + n // 3 % 7]} {n}") for n in range(count)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 90 snippets, sorted by rating as the real ones are, and a tokenizer of a few words."""
    folder = write_snippets(tmp_path / "texts" / "package", sorted(made_up(90))).parent
    write_tokenizer(folder, WORDS)
    return folder


def parts(sources: Sources) -> list[tuple[dict[str, Tensor], Tensor]]:
    found = []
    for split in (sources.train, sources.validation, sources.test):
        assert isinstance(split, TensorSplit)
        assert isinstance(split.inputs, dict)
        assert isinstance(split.targets, Tensor)
        found.append((split.inputs, split.targets))
    return found


def test_a_snippet_is_in_the_test_by_its_own_text_alone(texts: Path) -> None:
    rows = snippets.snippets(texts)
    expected = [value for value, text in rows if zlib.crc32(text.encode()) % 1000 < snippets.TEST]
    assert 5 < len(expected) < 40
    assert parts(rating(section(texts), 0))[2][1].tolist() == expected
    assert parts(rating(section(texts, validation=0.5), 7))[2][1].tolist() == expected
