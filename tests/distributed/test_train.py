"""``nipq train`` in two processes: the numbers of one, exact resume, and errors instead of waiting."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nipq.distributed import rank
from nipq.errors import ConfigError, DistributedError, FileFormatError
from nipq.nn import quantizer
from nipq.train import checkpoint, optim
from nipq.train import trainer as trainer_module
from nipq.train.config import check_config
from nipq.train.pipeline import run
from nipq.train.trainer import Trainer
from tests.distributed.ranks import Ranks
from tests.distributed.runs import SETTINGS, StopError, attempt, in_rank, patched, train

FSDP = {"parallel": {"strategy": "fsdp"}}
SHORT = {"stages": {"float": {"epochs": 1}, "search": {"epochs": 2}, "finetune": {"epochs": 1}}}
SAVES = 9
"""Checkpoints of an interrupted run: it stops within an epoch of the search."""


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest number of the tensor."""
    assert first.keys() == second.keys()
    return max(
        float((first[name].double() - second[name].double()).abs().max() / first[name].double().abs().max().clamp(1))
        for name in first
        if first[name].numel()
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process."""
    return train(tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def both(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in two, under DDP."""
    return ranks(in_rank, tmp_path_factory.mktemp("both") / "run", {})[0]


def test_two_processes_give_the_numbers_of_one(alone: dict[str, Any], both: dict[str, Any]) -> None:
    """54 steps of float training, search and fine-tuning, with the noise of one process for every sample."""
    assert alone["steps"] == both["steps"] == 54
    assert distance(alone["model"], both["model"]) < 1e-4
    for state, scores in alone["states"].items():
        for split, found in scores.items():
            assert both["states"][state][split]["loss"] == pytest.approx(found["loss"], rel=1e-4)
    assert alone["states"]["finetuned"]["test"]["loss"] < 2  # it learned something


def test_sharded_processes_give_the_numbers_of_one(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    found = ranks(in_rank, tmp_path / "run", FSDP)
    same(found[0]["model"], found[1]["model"])
    assert distance(alone["model"], found[0]["model"]) < 1e-4
    assert not list((tmp_path / "run").glob("*.shards"))  # the model is whole at the end


def test_momentum_of_sharded_processes_goes_on_across_the_freeze(ranks: Ranks, tmp_path: Path) -> None:
    settings = {**SHORT, "optimizer": {**SETTINGS["optimizer"], "schedule": "spanning"}}
    alone = train(tmp_path / "alone", **settings)
    found = ranks(in_rank, tmp_path / "both", {**settings, **FSDP})
    same(found[0]["model"], found[1]["model"])
    assert distance(alone["model"], found[0]["model"]) < 1e-4


def test_ranks_have_noise_of_their_own(ranks: Ranks) -> None:
    first, second = ranks(first_draws)
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert ranks(first_draws)[1] == second


def first_draws() -> tuple[int, float]:
    """A key that a step draws on this rank, and a weight after the step."""
    keys: list[int] = []
    with patched(common_noise=False), pytest.MonkeyPatch.context() as patch:
        trainer = Trainer(check_config({**SETTINGS, **SHORT, "stages": {"search": {"epochs": 1}}}))
        trainer.advance()
        draw = quantizer.draw_key

        def kept(device: torch.device) -> Tensor:
            key = draw(device)
            keys.append(int(key))
            return key

        patch.setattr(quantizer, "draw_key", kept)
        trainer.step(*next(trainer.batches()))
        return keys[0], float(next(trainer.model.parameters()).detach().sum())


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_equals_not_stopping_to_the_bit(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    settings = {**SHORT, "parallel": {"strategy": strategy}, "common_noise": False}
    expected = ranks(in_rank, tmp_path / "whole", settings)[0]
    ranks(in_rank, tmp_path / "stopped", {**settings, "saves": 5})
    assert len(list((tmp_path / "stopped").glob("*.shards"))) == (strategy == "fsdp")
    found = ranks(in_rank, tmp_path / "stopped", {**settings, "resume": True})
    same(expected["model"], found[0]["model"])
    same(found[0]["model"], found[1]["model"])
    assert expected["states"] == found[0]["states"]
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    for row, other in zip(map(json.loads, first.splitlines()), map(json.loads, second.splitlines()), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_from_two(ranks: Ranks, tmp_path: Path, alone: dict[str, Any], strategy: str) -> None:
    settings = {"parallel": {"strategy": strategy}}
    ranks(in_rank, tmp_path / "run", {**settings, "saves": SAVES})
    found = train(tmp_path / "run", resume=True, **settings)
    assert found["steps"] == 54
    assert distance(alone["model"], found["model"]) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_from_one(ranks: Ranks, tmp_path: Path, alone: dict[str, Any], strategy: str) -> None:
    """The strategy may change with the number of processes."""
    train(tmp_path / "run", saves=SAVES)
    found = ranks(in_rank, tmp_path / "run", {"parallel": {"strategy": strategy}, "resume": True})[0]
    assert distance(alone["model"], found["model"]) < 1e-4


# ---------------------------------------------------------------------- what goes wrong


@pytest.fixture(scope="module")
def sharded(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stopped run with shards; not to be changed."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    ranks(in_rank, folder, {**SHORT, **FSDP, "saves": 1})
    return folder


@pytest.mark.parametrize("how", ["no folder", "no index", "half a file"])
def test_shards_that_are_not_whole_are_refused_on_every_rank(
    ranks: Ranks, sharded: Path, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sharded, folder)
    shards = next(folder.glob("*.shards"))
    if how == "no folder":
        shutil.rmtree(shards)
    elif how == "no index":
        (shards / ".metadata").unlink()
    else:
        largest = max(shards.glob("*.distcp"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    for _, error in ranks.outcomes(in_rank, folder, {**SHORT, **FSDP, "resume": True}):
        assert isinstance(error, FileFormatError)
        assert f"expected the shards of a checkpoint in {shards}, could not read them" in str(error)


def killed_while_writing(folder: Path, keywords: dict[str, Any]) -> dict[str, Any]:
    """A run whose second checkpoint ends after the shards, before the file that makes them count."""

    def broken(*_: object) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        original, calls = checkpoint.all_or_none, [0]

        def second_fails(what: str) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                broken()
            return original(what)

        patch.setattr(checkpoint, "all_or_none", second_fails)
        return train(folder, **keywords)


def test_a_checkpoint_half_written_leaves_the_one_before(ranks: Ranks, tmp_path: Path) -> None:
    settings = {**SHORT, **FSDP, "common_noise": False}
    folder = tmp_path / "run"
    ranks(killed_while_writing, folder, settings)
    assert len(list(folder.glob("*.shards"))) == 2
    assert checkpoint.Checkpoint.load(folder / "checkpoint.pt").progress.step == 4
    ranks(in_rank, folder, {**settings, "resume": True, "saves": 1})
    assert len(list(folder.glob("*.shards"))) == 1


def full_disk(folder: Path) -> None:
    def refuse(*_args: object, **_keywords: object) -> None:
        raise CheckpointException("write", {1: (OSError("No space left on device"), None)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", refuse)
        train(folder, **SHORT, **FSDP)


def test_a_part_that_cannot_be_written_is_an_error_everywhere(ranks: Ranks, tmp_path: Path) -> None:
    for _, error in ranks.outcomes(full_disk, tmp_path / "run"):
        assert isinstance(error, DistributedError)
        assert "expected every process to write its part of" in str(error)
        assert "found that one could not (No space left on device); the checkpoint before is as it was" in str(error)


def odd_batches(size: int, limit: int) -> None:
    Trainer(check_config({**SETTINGS, "data": {"kind": "digits", "batch_size": size, "train_limit": limit}}))


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [
        (7, 64, "expected a batch size that 2 processes can share equally, found 7; set data.batch_size to 6 or 8"),
        (32, 1, "expected at least one training sample for each of 2 processes, found batches of 1"),
        (32, 9, "expected a batch size that 2 processes can share equally, found 9"),
    ],
)
def test_data_that_cannot_be_shared_are_refused(ranks: Ranks, size: int, limit: int, message: str) -> None:
    for _, error in ranks.outcomes(odd_batches, size, limit):
        assert isinstance(error, ConfigError)
        assert message in str(error)


def unlike(folder: Path) -> None:
    with patched(common_noise=False):
        run(check_config({**SETTINGS, **SHORT, "seed": rank()}), folder, quiet=True)


def test_ranks_that_start_from_different_seeds_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for _, error in ranks.outcomes(unlike, tmp_path / "run"):
        assert isinstance(error, DistributedError)
        assert "nipq train: expected the same model on every rank, found that the numbers in 0.weight" in str(error)
    assert not (tmp_path / "run").exists()


def with_a_spare_layer() -> None:
    trainer = Trainer(check_config({**SETTINGS, "model": {"factory": "tests.distributed.models:spare"}}))
    for batch in trainer.batches():
        trainer.step(*batch)
        trainer.follow()


def test_layers_that_take_no_part_are_named(ranks: Ranks) -> None:
    for _, error in ranks.outcomes(with_a_spare_layer):
        assert isinstance(error, ConfigError)
        assert "found that spare.weight, spare.bias did not, which parallel.strategy ddp waits for" in str(error)


def bad_on_rank_1() -> bool:
    """Whether parameters are those before the second step, whose loss is not finite on rank 1; looks in the third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "FUSED", ("cpu",))
        patch.setitem(trainer_module.LOOK_EVERY, "cpu", 3)
        trainer = Trainer(check_config({**SETTINGS, "parallel": {"sync_batchnorm": False}}))
    batches = trainer.batches()
    trainer.step(*next(batches))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    if rank() == 1:
        trainer.model[-1].register_forward_hook(lambda _module, _args, output: output / 0)
    trainer.step(*next(batches))
    error = attempt(lambda: trainer.step(*next(batches)))
    assert ("DistributedError" if rank() == 0 else "NonFiniteError") in error, error
    assert "epoch 1, step 2, found NaN or infinity" in error, error
    assert ("in another process" if rank() == 0 else "first in the output of 7") in error, error
    return all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_in_one_process_moves_nothing_in_any(ranks: Ranks) -> None:
    assert ranks(bad_on_rank_1) == [True, True]


def dying(folder: Path) -> None:
    """Rank 1 ends within the third step."""
    step, calls = Trainer.step, [0]

    def fatal(self: Trainer, inputs: Any, targets: Any) -> None:
        calls[0] += 1
        if rank() == 1 and calls[0] == 3:
            os._exit(1)
        step(self, inputs, targets)

    with patched(common_noise=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "step", fatal)
        run(check_config({**SETTINGS, **SHORT}), folder, quiet=True)


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    pair = Ranks(tmp_path)
    try:
        ((kind, error),) = pair.survivors(dying, tmp_path / "run").values()
        assert kind == "error"
        assert isinstance(error, DistributedError)
        assert "expected all 2" in str(error)
        assert "look for the first error in the other ranks' output" in str(error)
    finally:
        pair.close()
