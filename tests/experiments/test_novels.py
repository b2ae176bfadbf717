from __future__ import annotations

import gzip
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.tasks import novels
from experiments.tasks.decoder import NextCharacter, guess_without_reading, llama
from nipq.errors import ConfigError, MissingDependencyError
from nipq.prepare.validate import validate
from nipq.train.batches import TensorSplit
from nipq.train.config import TrainConfig
from nipq.train.pipeline import run
from tests.experiments.texts import section

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NAMES = (*novels.LEARNED, novels.UNSEEN)


def write_novels(folder: Path, texts: dict[str, list[str]]) -> Path:
    """The two files in which R keeps a package's data."""
    rdata = pytest.importorskip("rdata")
    place = folder / novels.FOLDER
    place.mkdir(parents=True)
    store, variables = b"", {}
    for name, lines in texts.items():
        rdata.write_rds(place / "one.rds", np.array(lines, dtype=object))
        raw = gzip.decompress((place / "one.rds").read_bytes())
        chunk = len(raw).to_bytes(4, "big") + zlib.compress(raw)
        variables[name] = np.array([len(store), len(chunk)], np.int32)
        store += chunk
    (place / "one.rds").unlink()
    (place / "Rdata.rdb").write_bytes(store)
    rdata.write_rds(place / "Rdata.rdx", {"variables": variables})
    return folder


def made_up(count: int) -> list[str]:
    """Lines in which every letter follows from the one before."""
    return ["abcdefgh" * 8 for _ in range(count)]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return write_novels(tmp_path / "deep", {name: made_up(40) for name in NAMES}).parent


def test_novels_are_read_line_by_line(tmp_path: Path) -> None:
    texts = {name: [name.upper(), "", "“Well—”, she said."] for name in NAMES}
    assert novels.novels(write_novels(tmp_path, texts)) == {name: "\n".join(lines) for name, lines in texts.items()}


def test_frequent_characters_get_numbers_and_the_rest_share_one() -> None:
    letters = [chr(0x100 + place) for place in range(novels.VOCABULARY + 8)]
    learned = "".join(letter * (200 - place) for place, letter in enumerate(letters))
    texts = dict.fromkeys(novels.LEARNED, "") | {"emma": learned, novels.UNSEEN: (letters[0] + letters[-1] + "?") * 60}
    found = novels.encoded(texts)
    assert found["learned"].max() == novels.VOCABULARY - 1
    unseen = found["unseen"][0].tolist()
    assert unseen[:3] == [1, 0, 0]


def test_windows_overlap_in_one_character_and_targets_are_the_next_ones(shelf: Path) -> None:
    sources = novels.characters(section(shelf, validation=0.25), 0)
    for split in (sources.train, sources.validation, sources.test):
        assert isinstance(split, TensorSplit)
        assert isinstance(split.inputs, torch.Tensor)
        assert isinstance(split.targets, torch.Tensor)
        assert split.inputs.shape == split.targets.shape == (split.count, novels.LENGTH)
        assert torch.equal(split.inputs[:, 1:], split.targets[:, :-1])
    windows = novels.encoded(novels.novels(shelf))["unseen"]
    assert (windows[:-1, -1] == windows[1:, 0]).all()
    assert sources.test.count == len(windows)
    assert len(list(shelf.glob("novels-*.npz"))) == 1


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_missing_novels_are_told_with_how_to_get_them(folder: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"expected the folder janeaustenr/data below {folder}.*r-cran-janeaustenr"):
        novels.characters(section(folder and Path(folder)), 0)


@pytest.mark.parametrize("damage", ["Rdata.rdx", "Rdata.rdb", "missing"])
def test_damaged_novels_are_refused_by_their_folder(shelf: Path, damage: str) -> None:
    (place,) = shelf.rglob(novels.FOLDER)
    if damage == "missing":
        (place / "Rdata.rdb").unlink()
    else:
        (place / damage).write_bytes(b"no data" * 10)
    with pytest.raises(ConfigError, match=r"expected six novels in .*r-cran-janeaustenr"):
        novels.novels(shelf)


def test_without_rdata_the_error_names_the_extra(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[tasks\]"):
        novels.novels(shelf)


def test_bits_per_character_in_closed_form() -> None:
    """A model that gives the right one of four characters half of the probability: one bit each."""
    targets = torch.tensor([[0, 1, 2], [3, 3, 0]])
    shares = torch.full((2, 3, 4), 1 / 6).scatter(2, targets[..., None], 0.5)

    class Fixed(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return shares.log()

    scores = NextCharacter().scores(Fixed(), [(targets, targets)])
    assert scores["bits_per_character"] == pytest.approx(1.0)
    assert scores["loss"] == pytest.approx(math.log(2))
    assert scores["accuracy"] == 100
    assert scores["count"] == 6


def test_distillation_is_the_divergence_of_the_distributions() -> None:
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert float(NextCharacter().distillation(ours, theirs)) == pytest.approx(float(expected), rel=1e-5)
    assert float(NextCharacter().distillation(ours, ours)) == pytest.approx(0, abs=1e-6)


def test_a_guesser_who_knows_frequencies_needs_their_entropy() -> None:
    assert guess_without_reading(torch.tensor([0, 0, 1, 3])) == pytest.approx(1.5)


def test_every_linear_layer_of_the_decoder_is_quantized() -> None:
    pytest.importorskip("transformers")
    model = llama(**SMALL).eval()
    findings = validate(model, torch.ones(1, 6, dtype=torch.int64))
    assert not [finding for finding in findings if finding.severity == "error"]
    floats = {finding.name for finding in findings if finding.severity == "float"}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) == 8
    assert not linear & floats


def test_a_run_trains_on_characters_and_proves_its_model(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("nipq.train.pipeline._plots", lambda *_: None)  # they would take most of the time
    model = {"factory": "experiments.tasks.decoder:llama", "kwargs": SMALL}
    config = {
        "task": "experiments.tasks.decoder:next_character_task",
        "model": model,
        "data": section(shelf, factory="experiments.tasks.novels:characters", batch_size=16).to_dict(),
        "budget": {"average_bits": {"weights": 4, "activations": 4}},
        "quantization": {"init": "max"},
        "stages": {"search": {"epochs": 2}, "finetune": {"epochs": 1}},
        "optimizer": {"name": "adam", "lr": 0.02},
        "teacher": {**model, "weights": None},
        "calibration_batches": 1,
        "threads": 1,
    }
    results = run(TrainConfig.model_validate(config), tmp_path / "run", quiet=True)
    assert results["verified"]
    assert results["average_bits"]["weights"] <= 4
    assert results["states"]["finetuned"]["test"]["bits_per_character"] < math.log2(novels.VOCABULARY)
