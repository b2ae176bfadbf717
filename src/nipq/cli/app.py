"""The ``nipq`` command: a table of commands, each loaded when it is run, so that help and completion need no torch."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from nipq import __version__
from nipq.errors import NipqError

#: Commands in the order of help: module, function in it, help line.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quantize": ("nipq.cli.quantize", "quantize_command", "Quantize a trained network with a folder of images."),
    "train": ("nipq.cli.train", "train", "Train, search bits under a budget, freeze, fine-tune, pack and verify."),
    "demo": ("nipq.cli.train", "demo", "Show the whole promise on digits, offline, in a minute."),
    "inspect": ("nipq.cli.inspection", "inspect_model", "List a model's layers and the budgets within reach."),
    "show": ("nipq.cli.show", "show", "Show a run: how far it is, its scores, its layers."),
    "export": ("nipq.cli.export", "export_model", "Write a deployed model as ONNX, QONNX, arrays or torch.export."),
    "verify": ("nipq.cli.export", "verify_files", "Compare packed and exported files with the trained model."),
    "compare": ("nipq.cli.compare", "compare_command", "Train methods at equal budgets; a table with intervals."),
    "doctor": ("nipq.cli.doctor", "doctor", "Show versions, the device and the optional parts installed."),
}


#: Set to 1 for whole tracebacks, as the option does.
TRACEBACK = "NIPQ_TRACEBACK"
#: Shows errors with all of their traceback, on every command.
TRACEBACK_OPTION = "--traceback"


class LazyGroup(TyperGroup):
    """Commands of :data:`COMMANDS`: stubs with a help line until one of them is run."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - typer's
        """Add the stubs."""
        super().__init__(**settings)
        for name, (_, _, line) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=line))

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - typer's
        """Names in the order of the table."""
        return list(COMMANDS)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's
        """Take ``--traceback`` from anywhere on the command line."""
        end = args.index("--") if "--" in args else len(args)
        if TRACEBACK_OPTION in args[:end]:
            os.environ[TRACEBACK] = "1"
        own = [argument for argument in args[:end] if argument != TRACEBACK_OPTION]
        rest: list[str] = super().parse_args(ctx, own + args[end:])
        return rest

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:  # noqa: ANN401
        """Load the command that is run."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), rest


def load_command(name: str) -> Any:  # noqa: ANN401 - typer's
    """Import a command of :data:`COMMANDS`.

    Args:
        name: key of the table.

    Returns:
        The command with its arguments.
    """
    module, function, _ = COMMANDS[name]
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(import_module(module), function))
    return get_command(single)


app = typer.Typer(
    name="nipq",
    cls=LazyGroup,
    help="Mixed-precision quantization of PyTorch models: learned bit-widths within a budget, verified to the bit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nipq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK_OPTION, help="Print whole tracebacks of errors; with any command.")
    ] = False,
) -> None:
    """Mixed-precision quantization of PyTorch models: learned bit-widths within a budget, verified to the bit."""


def main() -> None:
    """Entry point of the ``nipq`` command."""
    try:
        app()
    except (NipqError, OSError) as error:
        import_module("nipq.cli.reporting").leave(error)
