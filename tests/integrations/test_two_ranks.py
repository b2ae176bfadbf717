"""Each integration on two gloo processes: DDP survives the freeze, ranks end with one model and drew other noise."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from nipq.budget.budget import AverageBits, costs
from nipq.distributed import rank, rank_seed, whole, world_size
from nipq.distributed.fsdp import shard_
from nipq.errors import DistributedError, OrderError
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession
from tests.distributed.ranks import Ranks

X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 3
BUDGET = AverageBits(weights=4, activations=4)


def net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def prepared(seed: int = 3) -> nn.Module:
    return calibrate_(prepare_(net(seed), X[:1]), [X[:8]])


def outcome(model: nn.Module, session: QATSession) -> dict[str, Any]:
    assert all(q.is_frozen for q in quantizers(model))
    assert all(cost.rounded <= cost.target for cost in costs(model, BUDGET))
    found = {name: parameter.detach().clone() for name, parameter in session.model.named_parameters()}
    return {"parameters": found, "bits": session.bits, "stage": session.stage, "draw": torch.rand(4)}


def agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["stage"] == second["stage"] == "done"
    assert first["bits"] == second["bits"]
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])
    assert not torch.equal(first["draw"], second["draw"])  # noise of their own


def as_torchrun() -> None:
    """What torchrun tells a process; the group is there already."""
    here = str(rank())
    os.environ |= {"RANK": here, "LOCAL_RANK": here, "WORLD_SIZE": str(world_size()), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    warnings.simplefilter("ignore")


# ---------------------------------------------------------------------- on each rank


def plain(find_unused: bool) -> dict[str, Any]:
    model = prepared()
    torch.manual_seed(rank_seed(5))
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused).train()
    session = QATSession(wrapped, BUDGET, 12, optimizer=optimizer, loader=[X[rank() :: 2]], finetune=0.3)
    for step in range(12):
        own = slice(8 * ((2 * step + rank()) % 8), 8 * ((2 * step + rank()) % 8) + 8)
        output = wrapped(X[own])
        (cross_entropy(output, Y[own]) + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    return outcome(model, session)


def started(allocation: Any) -> dict[str, Any]:
    """Everything from a model that nobody calibrated, with bits that may be frozen after DDP has seen them."""
    model = prepare_(net(), X[:1])
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-2)
    wrapped = DistributedDataParallel(model).train()
    own = slice(rank(), None, 2)
    session = QATSession(
        wrapped, BUDGET, 6, optimizer=optimizer, loader=[(X[own], Y[own])], loss_fn=cross_entropy,
        allocation=allocation,
    )  # fmt: skip
    for step in range(6):
        torch.manual_seed(rank_seed(step))
        (cross_entropy(wrapped(X[own]), Y[own]) + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    return outcome(model, session)


def sharded() -> dict[str, Any]:
    model = shard_(prepared())
    torch.manual_seed(rank_seed(5))
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    session = QATSession(model.train(), BUDGET, 8, optimizer=optimizer, loader=[X[rank() :: 2]], finetune=0.3)
    for step in range(8):
        own = slice(8 * ((2 * step + rank()) % 8), 8 * ((2 * step + rank()) % 8) + 8)
        (cross_entropy(model(X[own]), Y[own]) + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    found = outcome(model, session)
    return found | {"parameters": {name: whole(value) for name, value in found["parameters"].items()}}


def differing() -> None:
    QATSession(prepared(seed=rank()), BUDGET, 10, loader=[X])


def wrapped_early() -> None:
    model = net()
    wrapped = DistributedDataParallel(model)
    calibrate_(prepare_(model, X[:1]), [X[:8]])
    QATSession(wrapped, BUDGET, 10, loader=[X])


def accelerated() -> dict[str, Any]:
    as_torchrun()
    import accelerate

    from nipq.integrations.accelerate import AcceleratedSession

    accelerate.utils.set_seed(5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    net = prepared()
    accelerate.utils.set_seed(5)
    optimizer = torch.optim.AdamW(param_groups(net, 1e-2))
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    assert isinstance(model, DistributedDataParallel)
    session = AcceleratedSession(accelerator, model, BUDGET, 8, optimizer=optimizer, loader=[X], finetune=0.3)
    for _ in range(4):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y) + session.penalty())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                session.step()
    assert session.steps == 8
    session.finish()
    return outcome(net, session)


def hugged(folder: str) -> dict[str, Any]:
    as_torchrun()
    import transformers

    from nipq.integrations.transformers import quantize

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes)
    ids = torch.randint(0, 40, (64, 6))
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=8, num_train_epochs=3, report_to=[], save_strategy="no",
        disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    trainer = transformers.Trainer(transformers.BertForSequenceClassification(config), arguments, train_dataset=data)
    callback = quantize(trainer, BUDGET, finetune=0.3)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert callback.session.steps == 12
    return outcome(trainer.model, callback.session)


def lit(folder: str, resume: str | None = None) -> dict[str, Any]:
    as_torchrun()
    import pytorch_lightning as pl

    from nipq.integrations.lightning import NipqCallback

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = prepared()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(param_groups(self, 1e-2))

    pl.seed_everything(5, verbose=False)
    callback = NipqCallback(BUDGET, finetune=0.3)
    save = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback, save],
    )  # fmt: skip
    model = Net()
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), ckpt_path=resume)
    assert callback.session is not None
    assert callback.session.steps == 12
    return outcome(model, callback.session)


# ---------------------------------------------------------------------- here


@pytest.mark.parametrize("find_unused", [False, True])
def test_a_plain_loop(ranks: Ranks, find_unused: bool) -> None:
    agree(*ranks(plain, find_unused))


@pytest.mark.parametrize("allocation", ["noise", "uniform", None])
def test_a_plain_loop_from_a_model_that_is_not_calibrated(ranks: Ranks, allocation: Any) -> None:
    agree(*ranks(started, allocation))


def test_a_plain_loop_with_sharded_weights(ranks: Ranks) -> None:
    agree(*ranks(sharded))


def test_models_that_differ_and_wrappers_that_came_first_are_refused(ranks: Ranks) -> None:
    assert all(isinstance(error, DistributedError) for _, error in ranks.outcomes(differing))
    assert all(isinstance(error, OrderError) for _, error in ranks.outcomes(wrapped_early))


def test_accelerate(ranks: Ranks) -> None:
    pytest.importorskip("accelerate")
    agree(*ranks(accelerated))


def test_transformers(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    agree(*ranks(hugged, str(tmp_path)))


def test_lightning(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    agree(*ranks(lit, str(tmp_path)))
    for epoch in (0, 1):  # before the freeze, and after it: a checkpoint has the random numbers of one rank only
        agree(*ranks(lit, str(tmp_path / f"again{epoch}"), str(tmp_path / f"epoch={epoch}.ckpt")))
