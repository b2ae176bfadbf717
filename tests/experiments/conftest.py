"""Photographs made up for the tests: no pixel's colour occurs twice in one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.tasks import photos

NAMES = [f"set/photo{number}.png" for number in range(3)]


def distinct_pixels(height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8: the place times an odd number modulo 2^24, which never repeats and looks like noise."""
    number = np.arange(height * width, dtype=np.uint64) * 0x9E3779 % 2**24
    return np.stack([number >> 16, number >> 8 & 255, number & 255], -1).astype(np.uint8).reshape(height, width, 3)


def colours(crops: np.ndarray) -> set[int]:
    """The colours of crops [..., 3] as numbers."""
    return set((crops.reshape(-1, 3).astype(np.int64) @ [65536, 256, 1]).tolist())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three photographs, and a list that names them."""
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(distinct_pixels(320, 448)).save(path)
    listed = tmp_path / "list.txt"
    listed.write_text("# made up\n\n" + "\n".join(NAMES) + "\n", encoding="utf-8")
    monkeypatch.setattr(photos, "LIST", listed)
    return tmp_path / "photos"
