"""Slices of batches, sums that wait for nothing, and what a config may ask of several processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError, MissingDependencyError, NonFiniteError
from nipq.train import optim
from nipq.train.batches import TensorSplit, slice_of
from nipq.train.checks import Tally, non_finite_loss
from nipq.train.config import TrainConfig
from nipq.train.data import FolderSplit
from nipq.train.parallel import join_
from nipq.train.pipeline import run
from nipq.train.run_folder import RunFolder
from nipq.train.trainer import LOOK_EVERY, Trainer

Make = Callable[..., TrainConfig]
DATA = {"kind": "digits", "batch_size": 32, "train_limit": 128}


# ---------------------------------------------------------------------- slices


def test_parts_put_together_are_the_whole_batch() -> None:
    def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + torch.rand(inputs.shape, generator=generator)

    inputs, targets = {"ids": torch.arange(12.0)[:, None]}, torch.arange(12)
    split = TensorSplit(inputs["ids"], targets, batch_size=6, eval_batch_size=4, augment=noisy)
    parts = [split.part(index, 3) for index in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    for whole, *slices in zip(split.epoch(5, 1), *(part.epoch(5, 1) for part in parts), strict=True):
        assert torch.equal(torch.cat([x for x, _ in slices]), whole[0])
        assert torch.equal(torch.cat([y for _, y in slices]), whole[1])
    assert [len(x) for x, _ in parts[1]] == [4, 4, 4]  # evaluation batches are whole


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    split = TensorSplit(torch.zeros(6, 1), None, batch_size=3, eval_batch_size=3)
    with pytest.raises(ConfigError, match="that 2 processes can share equally, found one of 3 samples"):
        next(split.part(0, 2).epoch(0))
    assert slice_of(4, 1, 2) == slice(2, 4)


def test_image_folders_decode_their_part_only(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = pytest.importorskip("torchvision.datasets")
    for place in range(8):
        (tmp_path / "a").mkdir(exist_ok=True)
        image.new("RGB", (16, 16), (place * 20, 0, 0)).save(tmp_path / "a" / f"{place}.png")
    config = TrainConfig.model_validate(
        {"model": {"factory": "resnet18"}, "data": {"kind": "image_folder", "batch_size": 4, "image_size": 8},
         "budget": None}
    ).data  # fmt: skip
    split = FolderSplit(folder.ImageFolder(str(tmp_path)), list(range(8)), config)
    parts = [split.part(index, 2) for index in range(2)]
    for whole, *slices in zip(split.epoch(5, 1), *(part.epoch(5, 1) for part in parts), strict=True):
        assert [len(x) for x, _ in slices] == [2, 2]
        assert torch.equal(torch.cat([x for x, _ in slices]), whole[0])


# ---------------------------------------------------------------------- sums


def test_sums_are_those_of_whole_numbers_read_every_step() -> None:
    tally = Tally(torch.device("cpu"), [1.0, 2.0, 3.0])
    tally.add(torch.tensor(0.5), torch.tensor(4.0), 8)
    tally.add(torch.tensor(0.25), 1.0, 8)
    assert tally.look() == [1 + 4 + 2, 2 + 5, 19]
    assert tally.gather() == tally.look() == [7, 7, 19]
    tally.add(torch.tensor(1.0), None, 1)
    assert tally.look()[0] == 8
    assert math.isnan(tally.look()[1])


def test_the_first_loss_that_is_not_finite_is_remembered() -> None:
    tally = Tally(torch.device("cpu"))
    found = [float(tally.watch(torch.tensor(x), step)) for step, x in enumerate((1.0, math.nan, 2.0, math.inf))]
    assert found == [0, 1, 1, 1]
    assert float(tally.bad_step) == 1


@pytest.fixture
def lagging(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer that looks once in three steps, as on a GPU."""
    monkeypatch.setattr(optim, "FUSED", ("cpu",))
    monkeypatch.setitem(LOOK_EVERY, "cpu", 3)
    return Trainer(make_config(stages={"float": {"epochs": 2}, "search": {"epochs": 1}}, data=DATA))


def test_sums_are_brought_up_to_date_once_in_so_many_steps(lagging: Trainer) -> None:
    counts = []
    for inputs, targets in lagging.batches():
        lagging.step(inputs, targets)
        counts.append(lagging.progress.sums[2])
    assert counts == [0, 0, 96, 96]
    lagging.gather()
    assert lagging.progress.sums[2] == 128


@pytest.mark.usefixtures("lagging")
def test_a_whole_run_that_looks_seldom_counts_every_sample(make_config: Make, tmp_path: Path) -> None:
    stages = {"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 1}}
    results = run(make_config(stages=stages, data=DATA, checkpoint_every=2), tmp_path / "run", quiet=True)
    assert results["verified"]
    rows = RunFolder(tmp_path / "run").rows()
    assert [row["stage"] for row in rows] == ["float", "search", "finetune"]
    assert all(0 < row["train_loss"] < 10 and 0 <= row["train_accuracy"] <= 100 for row in rows)


def test_a_loss_that_was_not_finite_is_found_later_and_its_place_named(lagging: Trainer) -> None:
    """No step after the bad one moves a parameter; what is not finite is the statistics of the batch norm behind."""
    lagging.model.blocks[1].register_forward_hook(explode_at(lagging, 1))
    batches = lagging.batches()
    lagging.step(*next(batches))
    before = [parameter.detach().clone() for parameter in lagging.model.parameters()]
    lagging.step(*next(batches))
    with pytest.raises(
        NonFiniteError, match=r"epoch 1, step 2, found NaN or infinity in blocks\.2\.depthwise_norm\.runn"
    ):
        lagging.step(*next(batches))
    assert all(torch.equal(p, q) for p, q in zip(lagging.model.parameters(), before, strict=True))


def test_a_bad_batch_is_named_when_it_is_looked_at_later(lagging: Trainer) -> None:
    """Its step is repeated, here without batch norms that would have kept a trace."""
    for module in lagging.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    lagging.model.classifier.register_forward_hook(explode_at(lagging, 1))
    batches = lagging.batches()
    for _ in range(2):
        lagging.step(*next(batches))
    with pytest.raises(
        NonFiniteError, match="epoch 1, step 2, found NaN or infinity first in the output of classifier"
    ):
        lagging.step(*next(batches))


def explode_at(trainer: Trainer, step: int) -> Callable[..., Tensor | None]:
    """A hook that spoils the outputs for the second batch of the epoch."""
    bad = list(trainer.train.epoch(trainer._data_key()))[step][0]
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        return output / 0 if torch.equal(seen[-1], bad) else None

    return hook


def test_a_model_held_in_parts_is_not_run_to_find_the_layer() -> None:
    model = nn.Linear(2, 2)
    error = non_finite_loss(model, torch.full((1, 2), math.nan), "now", rerun=False)
    assert "expected a finite loss now, found NaN or infinity on the way to the loss" in str(error)


# ---------------------------------------------------------------------- settings


def test_oscillation_is_refused_beside_shards(make_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"expected no oscillation beside parallel\.strategy fsdp"):
        make_config(parallel={"strategy": "fsdp"}, oscillation={"freeze": 0.01})


def test_one_process_does_without(make_config: Make) -> None:
    trainer = Trainer(make_config(parallel={"strategy": "fsdp"}))
    assert trainer.network is trainer.model
    assert not trainer.is_sharded


def test_another_engine_of_the_launcher_is_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nipq.train.parallel.is_distributed", lambda: True)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(name="DEEPSPEED"))
    with pytest.raises(ConfigError, match="found that they were launched with DEEPSPEED; launch them without it"):
        join_(nn.Linear(1, 1), make_config().parallel, accelerator)


def test_a_missing_accelerate_is_named_with_its_extra(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r'needed for nipq train; .*pip install "nipq\[train\]"'):
        Trainer(make_config())
