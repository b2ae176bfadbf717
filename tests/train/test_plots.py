"""The pictures are written for the sizes that occur, also with parts missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nipq.train.plots import Histogram, plot_bits, plot_history, plot_ranges


def row(stage: str, bits: float | None = None) -> dict[str, object]:
    if bits is None:
        return {"stage": stage, "train_accuracy": 50.0}
    limits = [{"name": "weights", "rounded": bits, "target": 4.0}]
    return {"stage": stage, "train_accuracy": 60.0, "val_accuracy": 55.0, "weight_bits": bits, "limits": limits}


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.width > 300 and image.height > 300 and len(image.convert("L").getcolors(256) or []) > 10


@pytest.mark.parametrize("count", [1, 60])
def test_bits(count: int, tmp_path: Path) -> None:
    layers = [{"name": f"block.{i}", "weight_bits": 4, "activation_bits": None if i == 0 else 3} for i in range(count)]
    plot_bits(layers, tmp_path / "plots" / "bits.png")
    assert is_picture(tmp_path / "plots" / "bits.png")


@pytest.mark.parametrize("rows", [[row("search", 5.0)], [row("float"), row("search", 6.0), row("finetune", 4.0)]])
def test_history(rows: list[dict[str, object]], tmp_path: Path) -> None:
    plot_history(rows, tmp_path / "history.png")
    assert is_picture(tmp_path / "history.png")


@pytest.mark.parametrize("count", [1, 6])
def test_ranges(count: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=500)
    items = [Histogram(f"layer.{i}", values, -0.7, 0.7, 0.1, 4, bool(i % 2)) for i in range(count)]
    plot_ranges(items, tmp_path / "ranges.png")
    assert is_picture(tmp_path / "ranges.png")
