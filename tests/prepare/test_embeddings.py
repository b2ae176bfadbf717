"""Embedding tables: their weight alone is quantized, from the config to the file; tied ones belong to their layer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.budget.budget import AverageBits, BitOps, ModelSize, stored_rows
from nipq.config import BitRange, Config, Rule
from nipq.errors import ConfigError, NotQuantizableError
from nipq.nn.layers import float_weight
from nipq.prepare.layer_table import layer_table, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_, restore_
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_
from nipq.qat.search import Search
from nipq.report.inspect import inspect
from nipq.report.summary import summary

IDS = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(0))


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Language(nn.Module):
    """Two tables, one of them with the head's weight if tied."""

    def __init__(self, *, tied: bool = False, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8, padding_idx=0, **settings)
        self.places = ScaledEmbedding(6, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        nn.init.constant_(self.hidden.bias, 1.0)  # so that no position is all 0 and every word equal
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.relu(self.hidden(x)))


def prepared(config: Config | None = None, **settings: bool) -> nn.Module:
    return calibrate_(prepare_(Language(**settings), IDS, config), [IDS])


def quantizers_of(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    return {row.name: (row.weight.bit_range.choices, row.weight.alpha_raw.numel()) for row in layer_table(model)}


def test_a_table_has_eight_bits_and_one_clipping_range_unless_told_otherwise() -> None:
    learned = tuple(range(2, 9))
    assert quantizers_of(prepared())["words"] == ((8,), 1)
    assert quantizers_of(prepared(Config(granularity="channel")))["words"] == ((8,), 1)
    assert quantizers_of(prepared(Config(embedding_bits=(2, 8))))["words"] == (learned, 1)
    ruled = quantizers_of(prepared(Config(rules=[Rule("words", weight_bits=(2, 4), granularity="channel")])))
    assert ruled["words"] == ((2, 3, 4), 11)
    assert ruled["places"] == ((8,), 1)
    assert all(row.input is None for row in layer_table(prepared()) if row.name in ("words", "places"))


def test_tables_may_stay_float_and_are_listed() -> None:
    model = prepared(config := Config(embedding_bits=None))
    assert set(quantizers_of(model)) == {"hidden", "head"}
    reasons = {finding.name: finding.reason for finding in validate(Language(), IDS, config)}
    assert reasons["words"] == reasons["places"] == "the settings leave embeddings float"
    mixed = Config(embedding_bits=None, rules=[Rule("words", weight_bits=4)])
    assert set(quantizers_of(prepared(mixed))) == {"words", "hidden", "head"}
    ruled = {f.name: f.reason for f in validate(Language(), IDS, Config(rules=[Rule("words", quantize=False)]))}
    assert ruled["words"] == "a rule excludes it"


@pytest.mark.parametrize("embedding_bits", [8, None, (2, 4)])
def test_a_tied_table_has_the_settings_of_the_layer_that_multiplies(embedding_bits: object) -> None:
    config = Config(weight_bits=(2, 6), granularity="channel", embedding_bits=embedding_bits)
    model = prepared(config, tied=True)
    words, *_, head = layer_table(model)
    assert words.weight is head.weight
    assert quantizers_of(model)["words"] == (tuple(range(2, 7)), 11)
    assert float_weight(words.layer) is float_weight(head.layer)


def test_a_rule_cannot_part_a_tied_table_from_its_layer() -> None:
    with pytest.raises(ConfigError, match=r"head: expected the settings of words, with which it shares its weight"):
        prepared(Config(rules=[Rule("words", weight_bits=3)]), tied=True)
    assert "words" not in quantizers_of(prepared(Config(rules=[Rule("words", quantize=False)]), tied=True))


def test_what_is_counted() -> None:
    rows = layer_table(model := prepared())
    average, size, operations = (AverageBits(weights=4) & ModelSize("1 MB") & BitOps("1 G")).limits(model)
    shares = dict(zip([row.name for row in rows], average.form.weight.tolist(), strict=True))
    assert shares == {"words": 0, "places": 0, "hidden": 64 / 152, "head": 88 / 152}
    covers = "over 152 weights in 2 tensors, 51.4% of all parameters, first and last layer included"  # 152 / (288 + 8)
    assert average.accounting == f"{covers}, 2 embedding tables not"
    assert size.form.weight.tolist() == [11, 6, 8, 11]
    assert operations.accounting.startswith("per sample over 2 layers")
    assert summary(model).bops == (64 + 88) * 6 * 5 * 5
    assert "Embedding tables count in the model's size alone" in inspect(Language(), IDS).policy
    (tied,) = AverageBits(weights=4).limits(model := prepared(tied=True))
    covers = "over 152 weights in 2 tensors, 73.1% of all parameters, first and last layer included"  # 152 / (200 + 8)
    assert tied.accounting == f"{covers}, 1 embedding tables not"
    assert stored_rows(layer_table(model))[0].name == "head"


class Routed(nn.Module):
    """Two experts; which one a sample meets depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.low, self.high = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x, high = self.words(ids), ids > 5
        y = torch.zeros_like(x)
        y[high], y[~high] = self.high(x[high]), self.low(x[~high])
        return y


def test_a_layer_that_the_example_batch_leaves_without_rows_is_no_table() -> None:
    ids = torch.tensor([[1, 2, 3]])  # none for the second expert
    model = calibrate_(prepare_(Routed(), ids), [IDS])
    rows = {row.name: row for row in layer_table(model)}
    assert rows["high"].spec.macs == 0
    assert [name for name, row in rows.items() if row.spec.is_table] == ["words"]
    assert rows["high"].input is not None
    assert quantizers_of(model)["high"] == quantizers_of(model)["low"] == (tuple(range(2, 9)), 1)
    (average,) = AverageBits(weights=4).limits(model)
    assert average.form.weight.tolist() == [0, 0.5, 0.5]


def test_one_number_for_all_layers_leaves_tables_as_they_are() -> None:
    set_bits_(model := prepared(), 4)
    assert {row.name: row.weight.bits_rounded for row in layer_table(model)} == {
        "words": 8, "places": 8, "hidden": 4, "head": 4,
    }  # fmt: skip
    set_bits_(model, {"words": {"weights": 3}})
    assert layer_table(model)[0].weight.bits_rounded == 3
    set_bits_(model := prepared(tied=True), 4)
    assert layer_table(model)[0].weight.bits_rounded == 4


@pytest.mark.parametrize("setting", ["max_norm", "sparse"])
def test_options_that_go_past_the_quantizer_are_refused(setting: str) -> None:
    with pytest.raises(NotQuantizableError, match=rf"words: its {setting.replace('sparse', 'sparse gradients')}"):
        prepare_(Language(**{setting: True}), IDS)
    prepare_(Language(**{setting: True}), IDS, Config(rules=[Rule("words", quantize=False)]))


def test_a_padding_row_is_refused_on_a_balanced_grid_that_has_no_zero() -> None:
    prepare_(Language(), IDS, Config(weight_levels="balanced"))  # tables have 8 bits, and a level at zero
    few = Rule("words", weight_bits=(2, 8))
    with pytest.raises(
        NotQuantizableError, match=r"words: it has a row for padding.*Rule\('words', weight_levels='symm"
    ):
        prepare_(Language(), IDS, Config(weight_levels="balanced", rules=[few]))
    symmetric = Rule("words", weight_levels="symmetric")
    model = prepared(Config(weight_levels="balanced", rules=[few, symmetric]))
    assert not model.eval().words(torch.zeros(1, dtype=torch.int64)).any()


def test_a_model_of_tables_alone_has_nothing_to_quantize() -> None:
    with pytest.raises(NotQuantizableError, match="expected a convolution or linear layer to quantize"):
        prepare_(nn.Sequential(nn.Embedding(11, 8)), IDS)


def test_training_moves_the_rows_that_were_read_and_no_padding() -> None:
    model = prepared().train()
    ids = torch.tensor([[0, 3, 3, 5]])
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    moved = float_weight(model.words).grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [3, 5]
    assert restore_(model) is model
    assert type(model.words) is nn.Embedding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_from_search_to_file(tied: bool, granularity: str, tmp_path: Path) -> None:
    rules = [] if tied else [Rule("words", weight_bits=(2, 8), granularity=granularity)]
    model = prepared(Config(granularity=granularity, rules=rules), tied=tied)
    budget = AverageBits(weights=4, activations=4) & ModelSize("5 kB")
    Search(model, budget, 2).penalty().backward()
    nipq.freeze_bits_(model, budget)
    deployed = nipq.convert(model)
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    result = nipq.verify(model, deployed, [IDS], file=path)
    assert result, str(result)
    assert [check.name[:2] for check in result.checks] == ["E0", "E1", "E2", "E3"]
    assert torch.equal(nipq.load(path, Language(tied=tied))(IDS), deployed(IDS))
    assert deployed.words.weight_codes.dtype == torch.int8
    assert (deployed.words.tied_to == "head" or deployed.head.tied_to == "words") == tied
    set_phase_(model.eval(), "round")
    with torch.no_grad():
        assert torch.equal(deployed.words(IDS), model.words(IDS))
        assert torch.equal(deployed.places(IDS[:, :3] % 6), model.places(IDS[:, :3] % 6))


def test_a_float_checkpoint_loads_strictly_and_a_frozen_state_too() -> None:
    model = prepared(tied=True)
    model.load_state_dict(Language(tied=True).state_dict(), strict=True)
    set_bits_(model, 4)
    copied = prepared(tied=True)
    copied.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert torch.equal(copied.eval()(IDS), model.eval()(IDS))


@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx", "model.npz", "model.pt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_files_hold_tables_too(name: str, tied: bool, tmp_path: Path) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    rules = [Rule("places", quantize=False)] if name.endswith("npz") else []
    model = prepared(Config(rules=rules), tied=tied)
    set_bits_(model, 5)
    report = nipq.export(nipq.convert(model), tmp_path / name, IDS)
    assert [layer.name for layer in report.layers if layer.name != "places"] == ["words", "hidden", "head"]
    result = nipq.verify(model, tmp_path / name, loader=[IDS])
    assert result, str(result)


def test_arrays_refuse_an_embedding_with_a_forward_of_its_own_by_name(tmp_path: Path) -> None:
    set_bits_(model := prepared(), 5)
    with pytest.raises(ConfigError, match=r"places: expected a layer .* found ScaledEmbedding with a"):
        nipq.export(nipq.convert(model), tmp_path / "model.npz", IDS)


def test_the_default_is_in_the_config() -> None:
    assert Config().embedding_bits == BitRange(fixed=8)
    assert Config.model_validate(Config(embedding_bits=None).to_dict()).embedding_bits is None
