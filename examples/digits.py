"""Scikit-learn's digits, and a small network trained on them in floats: the start of the examples."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, 1x8x8 with values from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])


def loader(train: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches."""
    return DataLoader(train, batch_size=64, shuffle=True)


def trained_network(train: TensorDataset, epochs: int = 8) -> nn.Module:
    """The float network that there is before nipq comes in."""
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader(train):
            optimizer.zero_grad()
            cross_entropy(network(x), y).backward()
            optimizer.step()
    return network


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Share of test images that are classified correctly."""
    x, y = test.tensors
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())
