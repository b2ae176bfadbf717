"""A loop around an Accelerator with one object more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from nipq.budget.budget import AverageBits, costs
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import param_groups

accelerate = pytest.importorskip("accelerate")
AcceleratedSession = pytest.importorskip("nipq.integrations.accelerate").AcceleratedSession

X = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(48) % 3
BUDGET = AverageBits(weights=4, activations=4)
EPOCHS, BATCHES = 4, 6


class Loop:
    """As people write them: Accelerate's loaders, accumulation, clipping, scheduler.

    Accelerate has float16 for accelerators only; ``half`` sets on a CPU what it would set there.
    """

    def __init__(self, folder: Path | None = None, accumulate: int = 1, *, half: bool = False, **settings: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.utils.set_seed(0)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, project_dir=folder, **settings
        )
        if half:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            self.accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8, 3))
        calibrate_(prepare_(net, X[:1]), [X])
        optimizer = torch.optim.AdamW(param_groups(net, 1e-2, 1e-2, bits_lr=5e-2))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.97**step] * 4)
        loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            net, optimizer, scheduler, loader
        )
        self.session = AcceleratedSession(
            self.accelerator,
            self.model,
            BUDGET,
            EPOCHS * BATCHES // accumulate,
            optimizer=self.optimizer,
            loader=[X],
            finetune=0.3,
        )

    overflow: tuple[int, int] | None = None
    average: WeightAverage | None = None

    def epochs(self, *numbers: int, stop_at: int | None = None, start: int = 0) -> Loop:
        self.model.train()
        self.seen: set[torch.dtype] = set()
        for number in numbers:
            self.loader.set_epoch(number)
            batches = self.accelerator.skip_first_batches(self.loader, start) if start else self.loader
            for place, (x, y) in enumerate(batches, start):
                if place == stop_at:
                    return self
                with self.accelerator.accumulate(self.model):
                    with self.accelerator.autocast():
                        outputs = self.model(x)
                        loss = cross_entropy(outputs, y)
                    self.seen.add(outputs.dtype)
                    overflow = float("inf") if (number, place) == self.overflow else 1.0
                    self.accelerator.backward(loss * overflow + self.session.penalty())
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                    self.session.step()
                    if self.average is not None and self.accelerator.sync_gradients:
                        self.average.update(self.session.model)
            start = 0
        return self


def keeps(model: nn.Module) -> bool:
    return all(q.is_frozen for q in quantizers(model)) and all(c.rounded <= c.target for c in costs(model, BUDGET))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_goes_through_all_stages(accumulate: int, precision: str) -> None:
    loop = Loop(accumulate=accumulate, mixed_precision=precision).epochs(*range(EPOCHS))
    assert loop.session.stage == "finetune"
    assert loop.session.steps == loop.session.total_steps == EPOCHS * BATCHES // accumulate
    loop.session.finish()
    assert {q.alpha_raw.dtype for q in quantizers(loop.model)} == {torch.float32}
    assert keeps(loop.model)


@pytest.mark.parametrize(("epoch", "place"), [(1, 3), (3, 0), (3, 2)])
def test_resuming_equals_not_stopping_to_the_bit(tmp_path: Path, epoch: int, place: int) -> None:
    whole = Loop(tmp_path).epochs(*range(epoch)).epochs(epoch, stop_at=place)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.epochs(*range(epoch, EPOCHS), start=place).session.finish()
    again = Loop(tmp_path)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.session.steps == epoch * BATCHES + place
    again.epochs(*range(epoch, EPOCHS), start=place).session.finish()
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_float16_a_step_that_the_scaler_skipped_does_not_count(accumulate: int) -> None:
    loop = Loop(accumulate=accumulate, half=True)
    loop.overflow = (0, 2)
    loop.epochs(0)
    assert loop.accelerator.scaler.get_scale() == 512.0
    assert loop.session.steps == BATCHES // accumulate - 1
    loop.epochs(*range(1, EPOCHS))
    assert loop.seen == {torch.float16}
    assert {q.alpha_raw.dtype for q in quantizers(loop.model)} == {torch.float32}
    loop.session.finish()
    assert loop.session.steps == EPOCHS * BATCHES // accumulate - 1
    assert keeps(loop.model)


def test_resuming_in_float16_takes_the_scale_along(tmp_path: Path) -> None:
    whole = Loop(tmp_path, half=True)
    whole.overflow = (0, 2)
    whole.epochs(0)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.epochs(*range(1, EPOCHS)).session.finish()
    again = Loop(tmp_path, half=True)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.accelerator.scaler.get_scale() == 512.0
    again.epochs(*range(1, EPOCHS)).session.finish()
    assert again.session.steps == whole.session.steps == EPOCHS * BATCHES - 1
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_clipping_does_not_see_the_bits() -> None:
    loop = Loop()
    (cross_entropy(loop.model(X), Y) + loop.session.penalty()).backward()
    bits = [q.bit_raw for q in quantizers(loop.model) if not q.is_frozen]
    before = [q.grad.clone() for q in bits]
    loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1e-4)
    assert all(torch.equal(bit.grad, old) for bit, old in zip(bits, before, strict=True))
    assert float(loop.model[0].parametrizations.weight.original.grad.norm()) < 1e-4
    assert float(loop.accelerator.clip_grad_norm_(loop.model[0].bias, 1.0)) < 1e-4


@pytest.mark.parametrize("epochs", [2, EPOCHS], ids=["stopped early", "across the freeze"])
def test_an_average_goes_along(epochs: int) -> None:
    loop = Loop()
    loop.average = WeightAverage(loop.session.model, 0.9)
    loop.epochs(*range(epochs))
    assert loop.session.stage == ("search" if epochs == 2 else "finetune")
    trained = loop.model[0].parametrizations.weight.original.detach().clone()
    loop.average.copy_to_(loop.session.model)
    loop.session.finish()
    assert keeps(loop.model)
    assert not torch.equal(loop.model[0].parametrizations.weight.original, trained)


def test_numbers_go_to_the_accelerators_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    loop = Loop(tmp_path).epochs(0)
    monkeypatch.setattr(loop.accelerator, "log", lambda values, step: sent.append((values, step)))
    loop.session.log()
    assert sent == [(loop.session.logs(), BATCHES)]


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    again: Callable[[], Any] = lambda: AcceleratedSession(  # noqa: E731  (called twice below)
        loop.accelerator, loop.model, BUDGET, 10, optimizer=loop.optimizer, loader=[X]
    )
    with pytest.raises(OrderError, match="accelerator: expected one session, found a second one"):
        again()
    loop.accelerator._custom_objects.clear()
    monkeypatch.setattr(loop.accelerator.state, "distributed_type", accelerate.DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=r"expected torch's own engine \(DDP or FSDP2\), found DEEPSPEED"):
        again()


def test_an_optimizer_that_was_prepared_before_the_model_is_refused_by_name() -> None:
    loop = Loop()
    loop.accelerator._custom_objects.clear()
    net = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
    model, early = loop.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    calibrate_(prepare_(net, torch.zeros(1, 36)), [X.flatten(1)])
    with pytest.raises(OrderError, match=r"it lacks .*alpha_raw"):
        AcceleratedSession(loop.accelerator, model, BUDGET, 10, optimizer=early)
