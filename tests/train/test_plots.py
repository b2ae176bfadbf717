"""The pictures are written for the sizes that occur, also with parts missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _path: found.append(figure))
    return found


def test_axes_of_a_history_say_true_numbers_and_lines_have_names(figures: list[Figure], tmp_path: Path) -> None:
    layer_bits = {f"encoder.{i}": [5.2 if i < 4 else 3.0, None if i else 8.0] for i in range(6)}
    rows = [
        row("search", 3.99999 + 1e-6 * epoch)
        | {"train_accuracy": 100.0, "val_accuracy": 99.9, "layer_bits": layer_bits}
        for epoch in range(4)
    ]
    plot_history(rows, tmp_path / "history.png")
    figures[0].draw_without_rendering()
    top, middle, bottom = figures[0].axes
    assert top.get_ylim()[1] == 100.0
    assert bottom.yaxis.get_major_formatter().get_offset() == ""
    assert [text.get_text() for text in middle.texts] == [
        "W: encoder.0, encoder.1 and 2 more", "A: encoder.0", "W: encoder.4, encoder.5",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 6])
def test_ranges(count: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=500)
    items = [Histogram(f"layer.{i}", values, -0.7, 0.7, 0.1, 4, bool(i % 2)) for i in range(count)]
    plot_ranges(items, tmp_path / "ranges.png")
    assert is_picture(tmp_path / "ranges.png")
