"""Output of commands: text for people, one JSON object with ``--json``, an exit status for scripts."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType

from nipq.files import json_text

#: Options that several commands have.
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
TargetOption = Annotated[str | None, typer.Option("--target", help="Runtime: onnxruntime, openvino or inductor.")]
#: Exit status of a command that failed; wrong usage has 2.
FAILURE = 1


class _Answers:
    """Standard output while it is kept for answers; None where it is not."""

    stream: TextIO | None = None


@contextmanager
def answers_alone() -> Iterator[None]:
    """Leave standard output to :func:`answer`: what factories and C++ libraries print goes to standard error."""
    if _Answers.stream is not None:
        yield
        return
    sys.stdout.flush()
    with ExitStack() as stack:
        stack.callback(setattr, _Answers, "stream", None)
        _Answers.stream = sys.stdout
        with suppress(OSError):  # one of the two is closed
            kept = os.dup(1)
            stack.callback(os.close, kept)
            encoding = sys.stdout.encoding
            if sys.stdout is sys.__stdout__:
                _Answers.stream = stack.enter_context(os.fdopen(kept, "w", encoding=encoding, closefd=False))
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
            stack.callback(_flush_c)  # or the text would wait in a buffer and appear behind the answer
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _flush_c() -> None:
    """Write out what C and C++ code has printed."""
    (ctypes.CDLL(None).fflush if os.name == "posix" else ctypes.cdll.msvcrt.fflush)(None)


def show(*parts: RenderableType) -> None:
    """Print text and tables, as wide as the terminal; 80 columns where output is redirected.

    Args:
        parts: texts of one line each, which the terminal wraps, and tables.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), crop=False)


def answer(values: Mapping[str, Any], *, ok: bool = True) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json_text({"ok": ok, **values}), file=_Answers.stream)
