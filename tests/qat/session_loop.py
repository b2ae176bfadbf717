"""The loop that the tests of a session train in, as people write them."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits, costs
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3
BUDGET = AverageBits(weights=4, activations=4)
TOTAL, FREEZE = 20, 14


def plain() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 3))


def net() -> nn.Module:
    torch.manual_seed(3)
    return calibrate_(prepare_(plain(), X[:1]), [X])


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 1e-2, 1e-2, bits_lr=5e-2), lr=1e-2, **settings)


class Loop:
    """A loop as people write them: AdamW, a schedule with a number for each group, clipping."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        self.model = (net() if model is None else model).train()
        self.optimizer = adamw(self.model)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rates, total_steps=60)
        given: dict[str, Any] = {
            "optimizer": self.optimizer,
            "loader": [X],
            "schedule": None,
            "finetune": 0.3,
        } | settings
        self.session = QATSession(self.model, BUDGET, TOTAL, **given)

    def steps(self, count: int) -> Loop:
        for _ in range(count):
            loss = cross_entropy(self.model(X), Y) + self.session.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.session.step()
        return self

    PARTS = ("session", "model", "optimizer", "scheduler")

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        states = {part: getattr(self, part).state_dict() for part in self.PARTS}
        torch.save(states | {"rng": torch.get_rng_state()}, file)
        return file

    def load(self, file: io.BytesIO, order: tuple[str, ...] = PARTS) -> Loop:
        file.seek(0)
        states = torch.load(file, weights_only=True)
        for part in order:
            getattr(self, part).load_state_dict(states[part])
        torch.set_rng_state(states["rng"])
        return self


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def keeps(model: nn.Module) -> bool:
    return all(q.is_frozen for q in quantizers(model)) and all(c.rounded <= c.target for c in costs(model, BUDGET))
