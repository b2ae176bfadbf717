"""Output of commands: text for people, one JSON object with ``--json``, an exit status for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from nipq.errors import NipqError

#: Options that several commands have.
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
TargetOption = Annotated[str | None, typer.Option("--target", help="Runtime: onnxruntime, openvino or inductor.")]
#: Exit status of a command that failed; wrong usage has 2.
FAILURE = 1


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn nipq's own errors into one message and exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except NipqError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
        else:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(FAILURE) from error


def answer(values: Mapping[str, Any], *, ok: bool = True) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps({"ok": ok, **values}))
