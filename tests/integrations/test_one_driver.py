"""One network for 50 steps through five training loops: equal bits and losses, for all of them drive QATSession."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from nipq.budget.budget import AverageBits
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession
from nipq.train.batches import Sources, Split
from nipq.train.config import DataConfig, TrainConfig
from nipq.train.pipeline import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

EPOCHS, BATCHES, SIZE = 5, 10, 8
STEPS = EPOCHS * BATCHES
X = torch.randn(BATCHES * SIZE, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.flatten(1).sum(1) > 0).long() + (X[:, 0, 0, 0] > 0).long()
BUDGET = AverageBits(weights=3, activations=4)
RATE, MOMENTUM = 0.02, 0.9
#: Of the session. Bits start in the middle of their range, so that the search has something to do in every loop.
SETTINGS: dict[str, Any] = {"finetune": 0.4, "schedule": None, "allocation": None}


#: Every network that was built, for a loop that builds its own.
BUILT: list[Any] = []


class Network(nn.Module):
    """A network that seeds the noise of each training step and notes the loss: every loop then has the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(24, 3))
        self.losses: list[float] = []
        BUILT.append(self)

    def forward(self, x: Tensor) -> Tensor:
        trains = self.training and torch.is_grad_enabled()
        if trains:
            torch.manual_seed(len(self.losses))
        logits = self.layers(x)
        if trains:
            start = len(self.losses) % BATCHES * SIZE
            self.losses.append(float(cross_entropy(logits.detach(), Y[start : start + SIZE])))
        return logits


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return X[place], Y[place]


def loader() -> DataLoader[Any]:
    return DataLoader(Samples(), batch_size=SIZE)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(param_groups(model), lr=RATE, momentum=MOMENTUM)


def outcome(network: Network) -> tuple[list[int], list[float]]:
    return [quantizer.bits_rounded for quantizer in quantizers(network)], network.losses


def plain_loop(_folder: Path) -> Network:
    network = Network()
    prepare_(network, X[:1])
    optimizer = sgd(network)
    session = QATSession(network, BUDGET, STEPS, loader=loader(), optimizer=optimizer, **SETTINGS)
    network.train()
    for _ in range(EPOCHS):
        for x, y in loader():
            (cross_entropy(network(x), y) + session.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    session.finish()
    return network


def accelerate_loop(_folder: Path) -> Network:
    accelerate = pytest.importorskip("accelerate")
    integration = pytest.importorskip("nipq.integrations.accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator, network = accelerate.Accelerator(cpu=True), Network()
    prepare_(network, X[:1])
    model, optimizer, batches = accelerator.prepare(network, sgd(network), loader())
    session = integration.AcceleratedSession(
        accelerator, model, BUDGET, STEPS, optimizer=optimizer, loader=loader(), **SETTINGS
    )
    model.train()
    for _ in range(EPOCHS):
        for x, y in batches:
            accelerator.backward(cross_entropy(model(x), y) + session.penalty())
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    session.finish()
    return network


def lightning_loop(folder: Path) -> Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("pytorch_lightning")
    integration = pytest.importorskip("nipq.integrations.lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = prepare_(Network(), X[:1])

        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.network)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[integration.NipqCallback(BUDGET, module="network", loader=loader(), **SETTINGS)],
    )  # fmt: skip
    trainer.fit(module, loader())
    return module.network


def transformers_loop(folder: Path) -> Network:
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("nipq.integrations.transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.network(x)
            return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    class Named(Samples):
        def __getitem__(self, place: int) -> Any:
            return {"x": X[place], "labels": Y[place]}

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Named())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=SIZE, max_grad_norm=0.0,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = Model()
    prepare_(model, {"x": X[:1]})
    optimizer = sgd(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(model, arguments, train_dataset=Named(), optimizers=(optimizer, constant))
    integration.quantize(trainer, BUDGET, **SETTINGS)
    trainer.train()
    return model.network


class InOrderSplit(Split):
    """Batches in one order at every time."""

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def __len__(self) -> int:
        return BATCHES

    def epoch(self, key: int, start: int = 0) -> Iterator[Any]:
        for place in range(start, BATCHES):
            chosen = slice(place * SIZE, (place + 1) * SIZE)
            yield X[chosen], Y[chosen]


def in_order(_config: DataConfig, _seed: int) -> Sources:
    return Sources(train=InOrderSplit(), validation=None, test=InOrderSplit(), classes=3)


def nipq_train(folder: Path) -> Network:
    BUILT.clear()
    config = {
        "model": {"factory": "tests.integrations.test_one_driver:Network"},
        "data": {"kind": "custom", "factory": "tests.integrations.test_one_driver:in_order"},
        "budget": {"average_bits": {"weights": BUDGET.weights, "activations": BUDGET.activations}},
        "stages": {"float": {"epochs": 0}, "search": {"epochs": 3}, "finetune": {"epochs": 2}},
        "optimizer": {
            "name": "sgd", "lr": RATE, "momentum": MOMENTUM, "nesterov": False, "final": 1.0, "schedule": "spanning"
        },
        "allocation": "middle",
        "device": "cpu",
    }  # fmt: skip
    run(TrainConfig.model_validate(config), folder / "run", quiet=True)
    trained = [network for network in BUILT if len(network.losses) == STEPS]
    assert len(trained) == 1
    return trained[0]


LOOPS = [accelerate_loop, lightning_loop, transformers_loop, nipq_train]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], list[float]]:
    return outcome(plain_loop(tmp_path_factory.mktemp("plain")))


def test_the_search_of_the_reference_does_something(reference: tuple[list[int], list[float]]) -> None:
    bits, losses = reference
    assert len(losses) == STEPS
    assert len(set(bits)) > 1
    assert len(set(losses)) > STEPS // 2


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_finds_the_same_bits_and_losses(
    loop: Any, reference: tuple[list[int], list[float]], tmp_path: Path
) -> None:
    assert outcome(loop(tmp_path)) == reference
