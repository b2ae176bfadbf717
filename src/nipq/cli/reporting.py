"""Errors of commands: one message and an exit status; whose fault it was, where, and what to do."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer
from rich.console import Console
from rich.markup import escape

from nipq.cli.app import TRACEBACK
from nipq.cli.output import FAILURE, answer, answers_alone
from nipq.errors import NipqError
from nipq.train.user_code import WHOLE, innermost, last_line, origin, user_error

#: Exit status of a command that was interrupted.
INTERRUPTED = 130

_ROOM = "make room there or name a place on another disk; a run then goes on with --resume"
_RIGHTS = "name a place that you may write and read, or change its rights"
#: Advice by kind of ``OSError``.
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: "correct the path, or create the folder above it first",
    errno.ENOTDIR: "a part of the path is a file; correct the path",
    errno.EISDIR: "it is a folder where a file is needed; correct the path",
    errno.EEXIST: "it is there already; name another place",
    errno.ENOTEMPTY: "the folder is not empty; name another one",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EINVAL: "correct the path",
    errno.ELOOP: "a link leads to itself; correct the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer data.workers",
    errno.ENFILE: "raise the limit of open files of this machine, or use fewer data.workers",
    errno.EIO: "look at the disk, then go on with --resume",
    errno.ENOMEM: "use a smaller data.batch_size, or a machine with more memory",
}
#: The number of a system's error in the message of a library that is not Python's.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def tracebacks_wanted() -> bool:
    """Return whether whole tracebacks are asked for: ``--traceback`` on the command line, or the variable."""
    return os.environ.get(TRACEBACK, "") not in ("", "0")


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn every error into one message and an exit status other than 0."""
    with answers_alone() if as_json else nullcontext():
        try:
            yield
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BaseException as error:
            if tracebacks_wanted():
                traceback.print_exception(error)
            if as_json:
                answer({"error": type(told(error)).__name__, "message": str(told(error))}, ok=False)
            else:
                say_error(error)
            raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILURE) from error


def say_error(error: BaseException) -> None:
    """Print the message of an error on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(told(error)))}", highlight=False)


def told(error: BaseException) -> BaseException:
    """The error as a user is told of it: nipq's own as it is, others with place and advice.

    Args:
        error: as it was caught.

    Returns:
        An error whose class and message say it.
    """
    theirs = origin(error)
    if isinstance(error, NipqError):
        return error
    if isinstance(error, KeyboardInterrupt):
        where = f" in {theirs}" if theirs else ""
        return KeyboardInterrupt(f"interrupted{where}; a run goes on from its last checkpoint with --resume")
    if isinstance(error, OSError) and theirs is None:
        return OSError(_of_system(error))
    if (number := _NUMBER.search(str(error))) is not None and theirs is None:
        code = int(number[1] or number[2])
        return OSError(f"expected to read or write a file, found: {last_line(error)}; {REMEDIES.get(code, WHOLE)}")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MemoryError(f"expected enough memory, found: {last_line(error)}; use a smaller batch size or model")
    if theirs is not None:
        return user_error(error, "your code")
    if isinstance(error, ValueError) and "null" in str(error):
        return OSError("expected a path without a zero byte, found one with it; correct the path")
    return RuntimeError(
        f"expected no error that nipq does not know, found in {innermost(error)}: {last_line(error)}; this is a fault "
        f"of nipq or of a package that it uses: {WHOLE}, and report it"
    )


def _of_system(error: OSError) -> str:
    """Path, reason and remedy of an error of the system."""
    reason = error.strerror or last_line(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    path = f" {' and '.join(names)}" if names else " a file"
    return f"expected to read or write{path}, found: {reason}; {REMEDIES.get(error.errno or 0, WHOLE)}"


def leave(error: BaseException) -> None:
    """End the process with the message of an error that came outside of a command."""
    if tracebacks_wanted():
        traceback.print_exception(error)
    say_error(error)
    sys.exit(FAILURE)
