"""Compiling the kernels: once, kept, found again unharmed and our own, and done without where that cannot be."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nipq
import nipq.kernels.build as module
from nipq.files import CACHE
from nipq.kernels.build import SWITCH, library

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that was compiled once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("kept")))
        return module._compiled()


@pytest.fixture
def target(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library in the cache of this test, which is also what compiling gives."""

    def build(_compiler: list[str], target: Path) -> None:
        for path in (kept, module._checksum_file(kept)):
            (target.parent / f"new-{path.name}").write_bytes(path.read_bytes())
            (target.parent / f"new-{path.name}").chmod(0o600)
            (target.parent / f"new-{path.name}").replace(target.with_name(path.name))

    monkeypatch.setattr(module, "_build", build)
    return module._compiled()


#: Compiles to an empty file.
EMPTY = '[ "$1" = --version ] && exit; for name; do :; done; : > "$name"'


def compiler(folder: Path, script: str) -> str:
    path = folder / "fake"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_the_first_call_compiles_and_later_ones_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    (kept,) = (tmp_path / "cache").glob("*.so")
    assert kept.with_name(f"{kept.name}.sha256").read_text() == hashlib.sha256(kept.read_bytes()).hexdigest()
    written = kept.stat().st_mtime_ns
    library.cache_clear()
    assert library() is not None
    assert kept.stat().st_mtime_ns == written
    monkeypatch.setattr(module, "_processor", lambda: "another")
    library.cache_clear()
    assert library() is not None
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


@pytest.mark.distributed
@needs_compiler
def test_many_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = "from nipq.kernels.cpu import library; assert library() is not None"
    environment = os.environ | {CACHE: str(tmp_path / "shared"), "PYTHONPATH": str(Path(nipq.__file__).parents[1])}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert sorted(path.suffix for path in (tmp_path / "shared").iterdir()) == [".sha256", ".so"]


def test_no_compiler_is_said_once_and_plain_operations_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler on the path. Install a C\+\+ compiler, or set NIPQ_KER"):
        assert library() is None
    assert library() is None


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("CXX", compiler(tmp_path, '[ "$1" = --version ] || { echo "out of ink" >&2; exit 1; }'))
    with pytest.warns(UserWarning, match="fake failed: out of ink. Install a C"):
        assert library() is None
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "no checksum", "wrong checksum", "a link"])
def test_a_file_that_is_not_what_was_kept_is_built_anew_and_never_loaded(
    damage: str, target: Path, tmp_path: Path
) -> None:
    whole, checksum = target.read_bytes(), target.with_name(f"{target.name}.sha256")
    match damage:
        case "truncated":
            target.write_bytes(whole[:4096])  # its segments then end behind the file: to touch them is a SIGBUS
        case "empty":
            target.write_bytes(b"")
        case "flipped":
            target.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        case "no checksum":
            checksum.unlink()
        case "wrong checksum":
            checksum.write_bytes(b"\xff" * 64)
        case "a link":
            (tmp_path / "elsewhere.so").write_bytes(whole)
            target.unlink()
            target.symlink_to(tmp_path / "elsewhere.so")
    assert not module._is_whole(target)
    assert library() is not None
    assert target.read_bytes() == whole
    assert not target.is_symlink()
    assert checksum.read_text() == hashlib.sha256(whole).hexdigest()


@needs_compiler
def test_the_kept_files_and_the_new_folders_are_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, EMPTY))
    monkeypatch.setenv(CACHE, str(tmp_path / "new" / "deep" / "cache"))
    before = os.umask(0)
    try:
        target = module._compiled()
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    for folder in (target.parent, target.parent.parent, target.parent.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert module._is_whole(target)


def owned_by_another(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let one file or folder look as if another user owned it."""
    for name in ("stat", "lstat"):
        real = getattr(Path, name)

        def faked(self: Path, *, real=real, **options: bool) -> os.stat_result:
            found = real(self, **options)
            if self != path:
                return found
            fields = list(found)
            fields[stat.ST_UID] = os.geteuid() + 1
            return os.stat_result(fields)

        monkeypatch.setattr(Path, name, faked)


posix = pytest.mark.skipif(os.name != "posix", reason="needs owners of files")


@posix
@needs_compiler
def test_a_library_of_another_user_is_not_loaded(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        owned_by_another(patch, target)
        assert not module._is_whole(target)
        with pytest.warns(UserWarning, match="plain torch operations"):  # it looks so after the new build, too
            assert library() is None
    assert module._is_whole(target)


@posix
@pytest.mark.parametrize("above", [False, True])
def test_a_folder_of_another_user_is_not_used(above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    owned_by_another(monkeypatch, folder.parent if above else folder)
    with pytest.raises(module.BuildError, match=r"belongs to another user \(uid \d+, this one is \d+\). Set"):
        module._own_folder(folder)


@posix
@pytest.mark.parametrize(("mode", "own_group", "safe"), [
    (0o755, False, True), (0o775, False, False), (0o775, True, True), (0o757, True, False), (0o777, True, False),
])  # fmt: skip
@pytest.mark.parametrize("above", [False, True])
def test_a_folder_that_others_can_write_is_not_used(
    mode: int, own_group: bool, safe: bool, above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    (folder.parent if above else folder).chmod(mode)
    monkeypatch.setattr(module, "_is_private_group", lambda _gid: own_group)
    if safe:
        assert module._own_folder(folder) == folder
    else:
        with pytest.raises(module.BuildError, match=r"can be written by other users \(chmod go-w"):
            module._own_folder(folder)


@posix
def test_the_sticky_bit_makes_a_shared_folder_safe_above_the_cache_and_not_as_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o1777)
    assert module._own_folder(folder) == folder
    with pytest.raises(module.BuildError, match="can be written by other users"):
        module._own_folder(folder.parent)


@posix
def test_a_link_to_an_unsafe_folder_is_followed_before_it_is_judged(tmp_path: Path) -> None:
    (tmp_path / "unsafe").mkdir()
    (tmp_path / "unsafe").chmod(0o777)
    (tmp_path / "cache").symlink_to(tmp_path / "unsafe")
    with pytest.raises(module.BuildError, match="unsafe can be written"):
        module._own_folder(tmp_path / "cache")


@posix
def test_a_private_group_has_the_users_name_and_no_other_member(monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    class Entry:
        pw_name, pw_gid, gr_name = "ann", 1000, "ann"
        gr_mem: tuple[str, ...] = ()

    class Shared(Entry):
        gr_mem = ("ann", "bob")

    class Staff(Entry):
        gr_name = "staff"

    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: Entry)
    for entry, private in ((Entry, True), (Shared, False), (Staff, False)):
        monkeypatch.setattr(grp, "getgrgid", lambda _gid, entry=entry: entry)
        assert module._is_private_group(1000) is private

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert not module._is_private_group(1000)


def in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


@needs_compiler
@pytest.mark.parametrize("place", ["file", "loop", "long name", "dangling"])
def test_a_cache_that_cannot_be_made_is_one_warning(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    path = {"file": in_the_way(tmp_path), "long name": tmp_path / ("x" * 300)}.get(place, tmp_path / place)
    monkeypatch.setenv(CACHE, str(path))
    with pytest.warns(UserWarning, match=r"plain torch .*Set NIPQ_CACHE to a folder of your own.* or set NIPQ_K"):
        assert library() is None
    assert library() is None  # without another warning, which would be an error here


@needs_compiler
def test_a_full_disk_is_one_warning_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, EMPTY))

    def full(self: Path, _content: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="No space left on device.*with room, or set NIPQ_KERNELS=0"):
        assert library() is None
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_no_home_and_no_passwd_entry_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CACHE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.warns(UserWarning, match=r"found no home folder: Could not .* directory. Set NIPQ_CACHE to a folder"):
        assert library() is None


@needs_compiler
def test_a_library_without_the_functions_is_not_used(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUNCTIONS", {"nipq_absent": 1})
    with pytest.warns(UserWarning, match="lacks the function nipq_absent"):
        assert library() is None


def test_the_compiler_may_have_arguments_and_speak_any_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    fake = compiler(tmp_path, "printf '\\377' >&2; exit 1")
    monkeypatch.setenv("CXX", f"{fake} -x 'c++ '")
    assert module._compiler() == [fake, "-x", "c++ "]
    with pytest.warns(UserWarning, match="fake failed: \N{REPLACEMENT CHARACTER}. Install"):
        assert library() is None


def test_the_switch_turns_the_kernels_off_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None
