"""torch.distributed.checkpoint in a loop of one's own: what is saved sharded goes on, on as many ranks or on one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import nipq
from nipq.distributed import is_distributed, rank, whole
from nipq.distributed.fsdp import shard_
from tests.distributed.ranks import Ranks
from tests.distributed.test_sharding import BUDGET, Net, data, prepared

TOTAL = 10  # of which the last three come after the freeze


class Run:
    """A prepared model, sharded if there is anybody to share with, and its session."""

    def __init__(self, *, fresh: bool = False) -> None:
        torch.manual_seed(9)
        self.model: nn.Module = nipq.prepare_(Net(), torch.zeros(1, 6)) if fresh else prepared()
        if is_distributed():
            shard_(self.model)
        self.optimizer = torch.optim.AdamW(nipq.param_groups(self.model, lr=0.01))
        self.session = nipq.QATSession(
            self.model, BUDGET, TOTAL, optimizer=self.optimizer, finetune=0.3, calibration_batches=0
        )

    def train(self, until: int) -> Run:
        while self.session.steps < until:
            torch.manual_seed(100 * self.session.steps + rank())  # noise of the step, whoever computed the last
            loss = self.model(data(TOTAL)[self.session.steps]).square().mean()
            (loss + self.session.penalty()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.session.step()
        return self

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        quietly(dcp.save, {"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        if rank() == 0:
            (folder / "session.json").write_text(json.dumps(self.session.state_dict()))

    def load(self, folder: Path) -> Run:
        self.session.load_state_dict(json.loads((folder / "session.json").read_text()))  # first: it freezes what was
        model, optimizer = get_state_dict(self.model, self.optimizer)
        quietly(dcp.load, {"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return self

    def numbers(self) -> dict[str, Any]:
        return {name: whole(tensor.detach()).clone() for name, tensor in self.model.state_dict().items()}


def quietly(call: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own: one process, deprecated storage
        call(*args, **kwargs)


def stopped(folder: Path, at: int) -> dict[str, Any]:
    """Whole and in two parts, the second in a model that was never calibrated."""
    Run().train(at).save(folder)
    return {"one": Run().train(TOTAL).numbers(), "two": Run(fresh=True).load(folder).train(TOTAL).numbers()}


@pytest.mark.parametrize("at", [3, 8], ids=["search", "fine-tuning"])
def test_a_sharded_checkpoint_goes_on_to_the_bit(ranks: Ranks, tmp_path: Path, at: int) -> None:
    for found in ranks(stopped, tmp_path, at):
        assert found["one"].keys() == found["two"].keys()
        for name, tensor in found["one"].items():
            assert torch.equal(found["two"][name], tensor), name


@pytest.mark.parametrize("at", [3, 8], ids=["search", "fine-tuning"])
def test_one_process_goes_on_where_two_stopped(ranks: Ranks, tmp_path: Path, at: int) -> None:
    expected = ranks(saved, tmp_path, at)[0]
    run = Run(fresh=True).load(tmp_path)
    for name, tensor in run.numbers().items():
        assert torch.equal(tensor, expected[name]), name
    run.train(TOTAL)
    run.session.finish()
    assert run.session.stage == "done"


def saved(folder: Path, at: int) -> dict[str, Any]:
    run = Run().train(at)
    run.save(folder)
    return run.numbers()
