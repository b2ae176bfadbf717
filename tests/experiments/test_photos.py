from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.tasks import photos
from experiments.tasks.photos import cached, photographs, pixels, textured, tiles
from nipq.errors import ConfigError


def test_photographs_come_in_the_order_of_the_list_from_any_subfolder(folder: Path) -> None:
    deep = folder / "usr" / "share" / "set"
    deep.mkdir(parents=True)
    (folder / "set" / "photo1.png").rename(deep / "photo1.png")
    (folder / "photo0.png").write_bytes(b"the name alone is not enough")
    assert photographs(folder) == [folder / "set/photo0.png", deep / "photo1.png", folder / "set/photo2.png"]


def test_the_list_names_each_photograph_once() -> None:
    lines = [line for line in photos.LIST.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert len(lines) == len(set(lines)) == 82


@pytest.mark.parametrize("path", [None, "nowhere"])
def test_without_a_folder_the_error_says_how_to_get_the_photographs(path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"expected a folder of photographs .*plasma-workspace-wallpapers"):
        photographs(path)


def test_a_missing_photograph_is_named(folder: Path) -> None:
    (folder / "set" / "photo1.png").unlink()
    with pytest.raises(ConfigError, match=r"expected 3 photographs .*found 2.*missing is set/photo1.png.*apt-get"):
        photographs(folder)


def test_pixels_shrink_to_the_short_side_and_never_grow(folder: Path) -> None:
    path = folder / "set" / "photo0.png"
    assert pixels(path, 80).shape == (80, 112, 3)
    assert pixels(path, 1000).shape == (320, 448, 3)


def test_tiles_lie_side_by_side_and_flat_ones_are_told_apart() -> None:
    photo = np.zeros((5, 9, 3), np.uint8)
    photo[:2, 4:8:2] = 200
    squares = tiles(photo, 4)
    assert np.array_equal(squares, np.stack([photo[:4, :4], photo[:4, 4:8]]))
    assert textured(squares, deviation=1.0).tolist() == [1]
    assert textured(tiles(photo, 6), deviation=0.0).tolist() == []


def test_a_cache_is_read_again_only_for_its_own_recipe(folder: Path) -> None:
    made: list[int] = []

    def make(paths: list[Path]) -> dict[str, Any]:
        made.append(len(paths))
        return {"a": np.arange(3)}

    for recipe in ("one", "one", "two"):
        assert np.array_equal(cached(folder, "crops", recipe, make)["a"], np.arange(3))
    assert made == [3, 3]
    assert len(list(folder.glob("crops-*.npz"))) == 2
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_used_without_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    assert list(cached(folder, "crops", 0, lambda paths: {"count": np.array(len(paths))})) == ["count"]
    assert not list(folder.glob("crops-*"))
