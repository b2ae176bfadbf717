"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from nipq.errors import ConfigError
from nipq.files import CACHE, cache_folder, check_free, written_whole


def test_the_new_content_takes_the_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_is_refused_where_it_would_cost_something(tmp_path: Path) -> None:
    path = tmp_path / "model"
    check_free(path, overwrite=False, command="save")
    path.write_text("old")
    with pytest.raises(ConfigError, match=r"save: expected a name that is free, found the file .*overwrite=True"):
        check_free(path, overwrite=False, command="save")
    check_free(path, overwrite=True, command="save")
    with pytest.raises(ConfigError, match="found the folder"):
        check_free(tmp_path, overwrite=True, command="save")
    with pytest.raises(ConfigError, match="to exist, found none"):
        check_free(tmp_path / "absent" / "model", overwrite=False, command="save")


@pytest.mark.parametrize(("variables", "folder"), [
    ({CACHE: "/a/b"}, "/a/b"),
    ({CACHE: "odd name"}, "{cwd}/odd name"),
    ({CACHE: "~/x"}, "/home/of/ann/x"),
    ({CACHE: ""}, "/home/of/ann/.cache/nipq"),
    ({CACHE: "", "XDG_CACHE_HOME": "/caches"}, "/caches/nipq"),
    ({"XDG_CACHE_HOME": ""}, "/home/of/ann/.cache/nipq"),
    ({"XDG_CACHE_HOME": "relative"}, "/home/of/ann/.cache/nipq"),
])  # fmt: skip
def test_the_cache_folder_by_the_environment(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/of/ann", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder.format(cwd=tmp_path))


@pytest.mark.parametrize("variables", [{"HOME": ""}, {CACHE: "~no-such-user/cache"}])
def test_no_home_is_said_with_the_remedy(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"found no home folder: .*Set NIPQ_CACHE to a folder of your own"):
        cache_folder()
