"""Errors of code that is not nipq's: factories, modules, loaders and forwards, with the place in their own files."""

from __future__ import annotations

import re
import site
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nipq
from nipq.errors import NipqError, UserCodeError

#: nipq itself, and the folders of Python and of installed packages, as starts of file names.
_OWN = f"{Path(nipq.__file__).parent}/"
_INSTALLED = tuple(
    f"{folder}/"
    for folder in {
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)
#: A place in a traceback that has become text, as that of a loader's worker.
_PLACE = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')

#: How all of an error is seen.
WHOLE = "run again with --traceback (or NIPQ_TRACEBACK=1) for all of it"


def places(error: BaseException) -> list[tuple[str, int, str]]:
    """File, line and function of everything that an error passed, the innermost last."""
    found = [
        (frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    found += [(file, int(line), function) for file, line, function in _PLACE.findall(str(error))]
    if isinstance(error, SyntaxError) and error.filename is not None:
        found.append((error.filename, error.lineno or 1, "<module>"))
    return found


def origin(error: BaseException) -> str | None:
    """The innermost place of an error in code that is neither nipq's nor installed; ``None`` if there is none.

    Args:
        error: as it was caught.

    Returns:
        ``FILE, line N, in FUNCTION``.
    """
    theirs = [place for place in places(error) if not place[0].startswith((_OWN, *_INSTALLED, "<"))]
    return _text(theirs[-1]) if theirs else None


def innermost(error: BaseException) -> str:
    """The innermost place of an error, whoever's code it is."""
    found = [place for place in places(error) if not place[0].startswith("<")]
    return _text(found[-1]) if found else "an unknown place"


def last_line(error: BaseException) -> str:
    """Class and message of an error in one line, as a traceback ends.

    Example:
        >>> last_line(KeyError("width"))
        "KeyError: 'width'"
    """
    lines = [line.strip() for line in traceback.format_exception_only(error)]
    last = [line for line in "\n".join(lines).split("\n") if line.strip()]
    head = last[0] if not isinstance(error, SyntaxError) else last[-1]
    # A worker's error carries a whole traceback as its message, of which the end is the message.
    return last[-1].strip() if _PLACE.search(str(error)) else head


def user_error(error: BaseException, what: str) -> UserCodeError:
    """The error that says whose code failed, where, and how.

    Args:
        error: as it was caught.
        what: the code, such as ``"model factory 'nets:small'"``.
    """
    return UserCodeError(
        f"{what}: expected it to do its work, found that it failed in {origin(error) or innermost(error)}: "
        f"{last_line(error)}; correct it there, or {WHOLE}"
    )


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Run code of the user's: whatever it raises, also ``SystemExit``, becomes a :class:`~nipq.errors.UserCodeError`.

    nipq's own errors and ``KeyboardInterrupt`` pass.

    Args:
        what: the code, for the message.

    Raises:
        UserCodeError: if it failed.
    """
    try:
        yield
    except NipqError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        raise user_error(error, what) from error


def _text(place: tuple[str, int, str]) -> str:
    file, line, function = place
    return f"{file}, line {line}, in {function}"
