"""The run folder: never overwritten, continued only under the same config."""

from __future__ import annotations

from pathlib import Path

import pytest

from nipq.errors import ConfigError, FileFormatError
from nipq.train.config import TrainConfig, check_config
from nipq.train.run_folder import RunFolder


@pytest.fixture
def config() -> TrainConfig:
    return check_config({"model": {"factory": "resnet18"}, "data": {"kind": "digits"}, "budget": {"model_size": 9000}})


def test_a_run_is_never_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(config)
    with pytest.raises(ConfigError, match="already holds a run; continue the run with --resume"):
        place.start(config)


def test_foreign_files_are_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty"):
        RunFolder(tmp_path).start(config)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_config_is_read_back(config: TrainConfig, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(config)
    assert place.read_config() == config


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no config\.yaml"):
        RunFolder(tmp_path).read_config()


def test_other_settings_are_named(config: TrainConfig, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(config)
    other = config.model_copy(update={"seed": 7, "optimizer": config.optimizer.model_copy(update={"lr": 3.0})})
    with pytest.raises(ConfigError, match=r"optimizer\.lr, seed differ"):
        place.check_same(other)


def test_where_the_data_lie_may_change(config: TrainConfig, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    place.start(config)
    moved = config.data.model_copy(update={"path": "elsewhere", "workers": 3})
    place.check_same(config.model_copy(update={"data": moved, "checkpoint_every": 5}))


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    for epoch in range(3):
        place.append_row({"stage": "float", "epoch": epoch, "step": epoch})
    with place.metrics.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "cut o')
    place.truncate_rows(2)
    assert [row["epoch"] for row in place.rows()] == [0, 1]
    assert place.metrics.read_text(encoding="utf-8").count("\n") == 2


def test_missing_rows_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="expected 2 rows"):
        RunFolder(tmp_path).truncate_rows(2)
