"""From a grid file to complete configs, and what is wrong with one is said before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nipq.errors import ConfigError
from nipq.train.compare import Grid, expand, load_grid
from nipq.train.config import METHODS, check_config, merged

GRIDS = sorted((Path(__file__).parents[3] / "configs" / "grids").glob("*.yaml"))
MakeGrid = Callable[..., Grid]

BASE = {
    "model": {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}},
    "data": {"kind": "digits"},
}


def test_cells_come_seed_by_seed_and_float_first(make_grid: MakeGrid) -> None:
    grid = make_grid(budgets={"4/4": {"average_bits": {"weights": 4}}, "none": None})
    assert [cell.name for cell in expand(grid)] == [
        f"{name}-seed{seed}"
        for seed in (0, 1)
        for name in ("float", "ours-4-4", "rival-4-4", "ours-none", "rival-none")
    ]
    assert [cell.config["budget"] for cell in expand(grid)][:4:3] == [None, None]


def test_a_row_lies_over_its_preset_and_that_over_the_base(make_grid: MakeGrid, monkeypatch: Any) -> None:
    presets = {
        "nipq": {},
        "other": {"optimizer": {"momentum": 0.5, "lr": 0.2}, "quantization": {"weight_bits": {"allowed": [2, 4]}}},
    }
    monkeypatch.setitem(METHODS, "other", presets["other"])
    base = BASE | {"optimizer": {"lr": 0.1, "momentum": 0.1, "weight_decay": 0.3}}
    base |= {"quantization": {"weight_bits": {"min": 3, "max": 6}}}
    grid = make_grid(base=base, methods={"a": "other", "b": {"method": "other", "optimizer": {"lr": 0.3}}}, seeds=[5])
    _, a, b = expand(grid, presets)
    assert a.config["optimizer"] == {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.3}
    assert b.config["optimizer"] == {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.3}
    assert a.config["quantization"]["weight_bits"] == {"allowed": [2, 4]}, "a range is one value"
    assert (a.config["method"], a.config["seed"]) == ("other", 5)
    assert check_config(b.config).optimizer.lr == 0.3


def test_the_float_cell_trains_float_and_the_others_do_not(make_grid: MakeGrid) -> None:
    base = BASE | {
        "stages": {"float": {"epochs": 7}, "search": {"epochs": 3}, "finetune": {"epochs": 1}},
        "teacher": {"weight": 2.0},
    }
    start, ours, *_ = expand(make_grid(base=base, float={"optimizer": {"lr": 0.5}}))
    config = check_config(start.config)
    assert [config.stages.float.epochs, config.stages.search.epochs, config.stages.finetune.epochs] == [7, 0, 0]
    assert (config.budget, config.teacher, config.optimizer.lr) == (None, None, 0.5)
    assert config.quantization.weight_bits.fixed == 8
    config = check_config(ours.config)
    assert [config.stages.float.epochs, config.stages.search.epochs, config.stages.finetune.epochs] == [0, 3, 1]
    assert config.optimizer.lr != 0.5


def test_every_cell_starts_from_and_learns_from_the_float_cell_of_its_seed(make_grid: MakeGrid) -> None:
    other = {"factory": "resnet18", "weights": "DEFAULT"}
    named = {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}, "weights": "mine.pt"}
    methods = {
        "ours": "nipq",
        "none": {"method": "nipq", "teacher": None},
        "other": {"method": "nipq", "teacher": other},
        "named": {"method": "nipq", "teacher": named},
    }
    cells = {cell.row: cell for cell in expand(make_grid(base=BASE | {"teacher": {}}, methods=methods, seeds=[3]))}
    weights = "runs/float-seed3/float.pt"
    assert {cell.config["model"].get("weights") for cell in cells.values()} == {None, weights}
    assert cells["float"].config["model"].get("weights") is None
    assert cells["ours"].config["teacher"] == {**BASE["model"], "weights": weights}
    assert cells["none"].config["teacher"] is None
    assert cells["other"].config["teacher"] == other
    assert cells["named"].config["teacher"]["weights"] == "mine.pt"


def test_a_row_may_be_for_some_budgets_only(make_grid: MakeGrid) -> None:
    budgets = {str(bits): {"average_bits": {"weights": bits}} for bits in (4, 3)}
    methods = {"ours": "nipq", "ablated": {"method": "nipq", "batchnorm_batches": 0, "budgets": [3]}}
    cells = expand(make_grid(budgets=budgets, methods=methods, seeds=[0]))
    assert [cell.name for cell in cells] == ["float-seed0", "ours-4-seed0", "ours-3-seed0", "ablated-3-seed0"]


def test_a_list_of_words_is_rows_of_these_names(make_grid: MakeGrid) -> None:
    grid = make_grid(methods=["nipq"])
    assert grid.methods == {"nipq": {"method": "nipq"}}
    assert grid.baseline == "nipq"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"methods": {"a": "nipk", "b": {"method": "nipq"}, "c": {"optimizer": {}}}},
            ["row 'a': method: expected a known method (nipq", "did you mean 'nipq'?", "row 'c': method: expected one"],
        ),
        (
            {"methods": {"a": {"method": "nipq", "optimizer": {"lrr": 1}}, "b": {"method": "nipq", "sed": 1}}},
            ["row 'a': TrainConfig.optimizer.lrr: expected a known field", "row 'b': TrainConfig.sed"],
        ),
        ({"base": BASE | {"wrong": 1}}, ["base and float: TrainConfig.wrong: expected a known field"]),
        ({"float": {"optimizer": {"lr": -1}}}, ["base and float: TrainConfig.optimizer.lr"]),
        ({"budgets": {"4": {"average": 1}}}, ["budgets, '4': BudgetConfig.average: expected a known field"]),
        ({"methods": {"a b": "nipq", "a-b": "nipq"}}, ["two cells would be called 'a-b-4-4-seed0'"]),
    ],
    ids=["words", "fields", "base", "float", "budget", "names"],
)
def test_every_fault_is_named_with_its_row_and_field(
    changes: dict[str, Any], messages: list[str], make_grid: MakeGrid
) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(make_grid(**changes), {"nipq": {}})
    for message in messages:
        assert message in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)) <= 2, "a fault that many cells share is told once"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "hers"}, "baseline: expected a known row (ours, rival), found 'hers'"),
        ({"against": ["rifal"]}, "against: expected a known row (ours, rival), found 'rifal'; did you mean 'rival'?"),
        ({"methods": {"float": "nipq"}}, "expected no row of the name 'float'"),
        ({"methods": {"a": {"method": "nipq", "seed": 1}}}, "row 'a': expected no 'seed', found 1"),
        ({"methods": {"a": {"method": "nipq", "model": {}}}}, "row 'a': expected no 'model'"),
        ({"methods": {"a": {"method": "nipq", "budgets": ["5/5"]}}}, "row 'a': expected a known budget (4/4)"),
        ({"methods": {"a": {"method": "nipq", "budgets": "4/4"}}}, "expected a list of budgets, found '4/4'"),
        ({"base": {"budget": None}}, "base: expected no 'budget'"),
        ({"seeds": [1, 1]}, "seeds: expected different numbers from 0, found [1, 1]"),
        ({"seeds": []}, "Grid.seeds"),
        ({"rows": []}, "Grid.rows: expected a known field"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str, make_grid: MakeGrid) -> None:
    with pytest.raises(ConfigError) as caught:
        make_grid(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "expected a YAML grid file"), ("[1]", "expected a mapping"), ("name: x", "is not a valid grid")],
)
def test_a_file_that_is_no_grid_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_grid(path)
    with pytest.raises(ConfigError, match="expected a YAML grid file"):
        load_grid(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_example_grids_expand(path: Path) -> None:
    grid = load_grid(path)
    assert len(expand(grid)) >= len(grid.seeds) * (1 + len(grid.budgets))


def test_merging_changes_none_of_its_arguments() -> None:
    first, second = {"a": {"b": [1]}}, {"a": {"c": 2}}
    result = merged(first, second)
    result["a"]["b"].append(2)
    assert (first, second) == ({"a": {"b": [1]}}, {"a": {"c": 2}})
