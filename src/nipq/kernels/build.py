"""Build of the C++ kernels: compiled on first use, kept in the cache folder, checked whenever they are loaded.

Loading a library runs its code, so a kept one is trusted as ssh trusts a key: the file is the user's own, nobody else
can write in its folder or in one above, and its SHA-256 is the one kept beside it. A file that fails is built anew; a
folder that fails is not used. Where there are no kernels, one warning says why, and plain torch operations do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from nipq.errors import ConfigError
from nipq.files import CACHE, cache_folder, written_whole

try:
    import grp
    import pwd
except ImportError:  # Windows has neither, and no owners of files in this sense
    grp = pwd = None  # type: ignore[assignment]  # both are modules where there are any

#: Folder of the C++ source.
SOURCE = Path(__file__).with_name("source")

#: Set to 0 to do without compiled kernels.
SWITCH = "NIPQ_KERNELS"

#: Flags of the compiler; results are equal to those of torch, bit for bit.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp",
    "-ffp-contract=off",  # a multiply and an add round twice, as in torch
    "-fno-math-errno", "-fno-trapping-math",  # let rounding be one instruction; neither changes a value
)  # fmt: skip

#: Functions of the library, and how many addresses each takes.
FUNCTIONS = {
    "nipq_proxy_forward": 3, "nipq_proxy_backward": 6, "nipq_round_forward": 3, "nipq_round_backward": 6,
}  # fmt: skip


class BuildError(Exception):
    """The kernels could not be compiled or loaded; the message says why, and what to do without a full stop."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled, kept or loaded (said once, as a warning).

    The compiler is ``$CXX``, or the first of c++, g++, clang++ on the path. Kernels are compiled once a machine.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _load(_compiled())
    except (BuildError, ConfigError) as error:
        why = str(error)
    except OSError as error:
        why = f"{error}. Set {CACHE} to a folder of your own with room"
    warnings.warn(
        f"nipq trains with plain torch operations, about 1.5 times slower on a CPU: {why}, "
        f"or set {SWITCH}=0 to silence this.",
        stacklevel=2,
    )
    return None


def available() -> bool:
    """Return whether there are compiled kernels; a constant to ``torch.compile``."""
    return library() is not None


# All that ``torch.compiler.assume_constant_result`` does, but for importing the compiler, which is slow.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch's decorator sets


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if no whole one of our own is there yet."""
    compiler = _compiler()
    sources = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.?pp")))
    parts = (*sources, " ".join(FLAGS), _output([*compiler, "--version"]), _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _own_folder(cache_folder()) / f"kernels-{name}.so"
    if not _is_whole(target):
        _build(compiler, target)
    if not _is_whole(target):
        raise BuildError(f"{target} is damaged as soon as it is written. Check its disk")
    return target


def _build(compiler: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder, "cpu.o"), Path(folder, "cpu.so")
        _output([*compiler, *FLAGS, "-c", str(SOURCE / "cpu.cpp"), "-o", str(compiled)])
        # Linked without an OpenMP runtime: its symbols are found in the one that torch has loaded. A second runtime
        # would bring threads of its own, which wait in a loop on the cores that torch's threads need.
        _output([*compiler, "-shared", *_undefined_allowed(), str(compiled), "-o", str(linked)])
        content = linked.read_bytes()
    # Another process may do the same at this moment; both files are equal, and each appears whole.
    for path, written in ((target, content), (_checksum_file(target), hashlib.sha256(content).hexdigest().encode())):
        with written_whole(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(written)


def _checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _is_whole(path: Path) -> bool:
    """Return whether a kept library is a file of the user's own that nobody else can write, with its checksum."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or (os.name == "posix" and found.st_uid != os.geteuid()):
            return False
        if _fault(found):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == _checksum_file(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _own_folder(folder: Path) -> Path:
    """Create the cache folder where it is missing, and refuse one in which somebody else could put a library.

    Args:
        folder: absolute.

    Returns:
        The folder with its symbolic links followed, which no one else can point elsewhere later.

    Raises:
        BuildError: if another user owns or can write the folder or one above it.
        OSError: if it cannot be created.
    """
    for missing in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve(strict=True)
    for part in (folder, *folder.parents):
        if fault := _fault(part.stat(), shared=part != folder):
            raise BuildError(
                f"the kernel cache {folder} is not used, as {part} {fault}. Set {CACHE} to a folder of your own"
            )
    return folder


def _fault(found: os.stat_result, *, shared: bool = False) -> str | None:
    """Reason why a file or folder may hold what another user put there, or None.

    Args:
        found: of the file or folder.
        shared: allow everybody to write where the sticky bit keeps them from renaming each other's files, as in /tmp.
    """
    if os.name != "posix":
        return None
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {found.st_uid}, this one is {os.geteuid()})"
    if shared and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)):
        return "can be written by other users (chmod go-w takes that away)"
    return None


def _is_private_group(gid: int) -> bool:
    """Return whether a group is the user's own and nobody else's, as many systems give every user one."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in FUNCTIONS.items():
        try:
            function = getattr(loaded, name)
        except AttributeError as error:
            raise BuildError(f"{path} lacks the function {name}. Delete the file and correct CXX") from error
        function.argtypes, function.restype = [ctypes.c_void_p] * arguments, None
    return loaded


def _compiler() -> list[str]:
    """Command of the compiler; ``$CXX`` may hold arguments, as in ``ccache g++``."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(name) if name.count('"') % 2 == name.count("'") % 2 == 0 else []
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    raise BuildError("there is no C++ compiler on the path. Install a C++ compiler")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip()[-300:].rstrip(".")
        raise BuildError(f"{Path(command[0]).name} failed: {said}. Install a C++ compiler that works")
    return done.stdout


def _processor() -> str:
    """Features of the processor, which ``-march=native`` depends on: machines may share a cache folder."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.machine())


def _undefined_allowed() -> list[str]:
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
