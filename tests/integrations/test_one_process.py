"""Each integration on two gloo processes ends where one process ends that is given the same global batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from nipq.budget.budget import AverageBits
from nipq.distributed import rank, world_size
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession
from tests.distributed.common_noise import common_noise
from tests.distributed.ranks import Ranks
from tests.integrations.test_two_ranks import as_torchrun

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

#: Samples of a global batch, and steps of the search; bits are frozen behind the last one.
BATCH, STEPS = 16, 52
X = torch.randn(BATCH * 13, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
#: For calibration: of several ranks each reads its part.
APART = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
BUDGET = AverageBits(weights=4, activations=4)
#: No rounding in training: a value that lies next to the middle between two codes may take either.
COURSE = {"finetune": 0.0}


@contextmanager
def as_one() -> Iterator[int]:
    """Noise of one process on all ranks, which trainers seed alike; yields the samples of a rank's batch."""
    if world_size() > 1:
        as_torchrun()
    with common_noise(), pytest.MonkeyPatch.context() as patch:
        for library in ("accelerate", "lightning", "transformers"):
            patch.setattr(f"nipq.integrations.{library}.spread_seeds", lambda *_: None, raising=False)
        yield BATCH // world_size()


def own(samples: Tensor) -> Tensor:
    return samples.chunk(world_size())[rank()]


def prepared() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return calibrate_(prepare_(net, X[:1]), [own(APART)])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """No Adam: it would turn what rounding leaves of a vanished gradient into a whole step."""
    return torch.optim.SGD(param_groups(model, 0.05), momentum=0.9)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def outcome(session: QATSession | None, before: dict[str, Tensor]) -> dict[str, Any]:
    assert session is not None
    assert (session.steps, session.stage) == (STEPS, "done")
    found = parameters(session.model)
    moved = max(float((found[name] - before[name]).abs().max()) for name in found if name in before)
    return {"parameters": found, "bits": session.bits, "moved": moved}


# ---------------------------------------------------------------------- in one process, or on each rank


def accelerated() -> dict[str, Any]:
    import accelerate

    from nipq.integrations.accelerate import AcceleratedSession

    with as_one() as batch:
        accelerate.state.AcceleratorState._reset_state(True)  # what tests before left there: steps to accumulate
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True)
        model = prepared()
        accelerate.utils.set_seed(5)
        loader = DataLoader(TensorDataset(X, Y), batch_size=batch)
        wrapped, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
        session = AcceleratedSession(accelerator, wrapped, BUDGET, STEPS, optimizer=optimizer, **COURSE)
        for _ in range(4):
            for x, y in loader:
                accelerator.backward(cross_entropy(wrapped(x), y) + session.penalty())
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                session.step()
        session.finish()
        return outcome(session, parameters(prepared()))


def hugged(folder: str) -> dict[str, Any]:
    import transformers

    from nipq.integrations.transformers import quantize

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(data)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes, **no_dropout)
    torch.manual_seed(3)
    bert = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 40, (len(X) + 32, 6), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids[: len(X)]]
    with as_one() as batch:
        model = prepare_(bert, {"input_ids": ids[:1]})
        calibrate_(model, [{"input_ids": own(ids[len(X) :])}])
        before = parameters(model)
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=batch, num_train_epochs=4, report_to=[], seed=5,
            save_strategy="no", disable_tqdm=True, ddp_backend="gloo" if world_size() > 1 else None,
            average_tokens_across_devices=False,  # else a loss that is a mean already is doubled on two ranks
        )  # fmt: skip
        trainer = InOrder(model, arguments, train_dataset=data, optimizers=(sgd(model), None))
        callback = quantize(trainer, BUDGET, **COURSE)
        trainer.train()
        return outcome(callback.session, before)


def lit(folder: str) -> dict[str, Any]:
    import pytorch_lightning as pl

    from nipq.integrations.lightning import NipqCallback

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = prepared()

        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    with as_one() as batch:
        places = [rank() + world_size() * step for step in range(len(X) // BATCH)]
        loader = DataLoader(TensorDataset(X, Y), batch_sampler=[range(batch * at, batch * (at + 1)) for at in places])
        callback, model = NipqCallback(BUDGET, **COURSE), Net()
        pl.seed_everything(5, verbose=False)
        trainer = pl.Trainer(
            accelerator="cpu", strategy="ddp" if world_size() > 1 else "auto", devices=world_size(), max_epochs=4,
            logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=folder, callbacks=[callback], use_distributed_sampler=False, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(model, loader)
        return outcome(callback.session, parameters(Net()))


# ---------------------------------------------------------------------- here


def alike(ranks: Ranks, train: Callable[..., dict[str, Any]], *args: Any) -> None:
    expected, found = train(*args), ranks(train, *args)
    assert expected["moved"] > 0.01
    for here in found:
        assert here["bits"] == expected["bits"]
        for name, value in expected["parameters"].items():
            gap = float((here["parameters"][name] - value).abs().max() / value.abs().max().clamp(min=1))
            assert gap < 1e-5, name


def test_accelerate(ranks: Ranks) -> None:
    pytest.importorskip("accelerate")
    alike(ranks, accelerated)


def test_transformers(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    alike(ranks, hugged, str(tmp_path))


def test_lightning(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    alike(ranks, lit, str(tmp_path))
