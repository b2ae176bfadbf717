"""Small models and data for two ranks, and the part of the data that one of them sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nipq
from nipq.distributed import rank, world_size

BATCH = 16
Batch = tuple[Tensor, Tensor]


def net(norm: bool = True) -> nn.Sequential:
    """Two convolutions, with or without batch norms, and a classifier, on 3x6x6; the same at every call."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers)


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Global batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 3, 6, 6, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(count)
    ]


def own(given: list[Batch]) -> list[Batch]:
    """This rank's slice of every global batch."""
    size = BATCH // world_size()
    part = slice(rank() * size, (rank() + 1) * size)
    return [(x[part], y[part]) for x, y in given]


def prepared(norm: bool = True, calibrated: bool = True, **settings: object) -> nn.Sequential:
    """The net with quantizers."""
    model = nipq.prepare_(net(norm), torch.zeros(1, 3, 6, 6), nipq.Config(**settings))
    if calibrated:
        nipq.calibrate_(model, own(batches(4)), batches=4)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that the model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loss_of(model: nn.Module, given: Batch) -> Tensor:
    return cross_entropy(model(given[0]), given[1])


def endless(given: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from given


def digits() -> nn.Sequential:
    """Two convolutions with batch norms and a classifier, on 1x8x8; learns the digits in some fifty steps."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def spare() -> nn.Sequential:
    """The same with a layer that no forward reaches."""

    class Spare(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in list(self)[:-1]:
                x = layer(x)
            return x

    model = Spare(*digits())
    model.add_module("spare", nn.Linear(3, 3))
    return model


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
