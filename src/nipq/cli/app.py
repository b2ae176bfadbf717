"""The commands: arguments here, what they do in the file of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nipq.cli.compare import run_compare
from nipq.cli.demo import run_demo
from nipq.cli.doctor import examine, show_examination, show_tuned
from nipq.cli.export import export_model
from nipq.cli.inspection import show_inspection
from nipq.cli.output import FAILURE, JsonFlag, reporting
from nipq.cli.quantize import quantize_command
from nipq.cli.show import show_run
from nipq.cli.train import run_train
from nipq.cli.verify import verify_folder

TARGET_HELP = "Runtime to deploy on: onnxruntime, openvino or inductor."

app = typer.Typer(
    name="nipq",
    help="Mixed-precision quantization by noise: learn bit-widths, keep a budget, prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("quantize")(quantize_command)


def main() -> None:
    """Entry point of the ``nipq`` command."""
    app()


@app.command()
def doctor(
    tune: Annotated[
        bool, typer.Option("--tune", help="Find sizes of the kernels that suit the GPU; a minute.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show versions, the device and which optional parts are installed."""
    with reporting(as_json):
        if tune:
            show_tuned(as_json=as_json)
        elif not show_examination(examine(), as_json=as_json):
            raise typer.Exit(FAILURE)


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder; a temporary one if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole run.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the whole promise on digits, offline: train, search 4.0/4.0 bits, fine-tune, pack, verify."""
    with reporting(as_json):
        if not run_demo(folder, seed=seed, quiet=quiet or as_json, as_json=as_json):
            raise typer.Exit(FAILURE)


@app.command()
def inspect(
    factory: Annotated[str, typer.Argument(help="torchvision name, or package.module:callable.")],
    input_shape: Annotated[str, typer.Option(help="Shape of the input, batch first.")] = "1,3,224,224",
    arguments: Annotated[str, typer.Option("--kwargs", help="Arguments of the factory, as YAML or JSON.")] = "{}",
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Promise the bytes of ONNX files, too; a minute or two.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List a model's layers, what stays float and why, and the budgets within reach."""
    with reporting(as_json):
        show_inspection(factory, input_shape, arguments, target=target, onnx=onnx, as_json=as_json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config; see configs/.")],
    folder: Annotated[Path, typer.Option("--run", help="Run folder; new, or with --resume an old one.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="Folder of the data (overrides data.path).")] = None,
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value; overrides a field.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train, search bits under a budget, freeze, fine-tune, pack and verify."""
    with reporting(as_json):
        ok = run_train(
            config,
            folder,
            resume=resume,
            data=data,
            target=target,
            assignments=assignments or [],
            quiet=quiet or as_json,
            as_json=as_json,
        )
        if not ok:
            raise typer.Exit(FAILURE)


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="YAML grid of methods, budgets and seeds; see docs/guide/comparing.md.")],
    folder: Annotated[Path, typer.Option("--run", help="Folder of the comparison; what is done in it stays.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the data (overrides data.path).")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells side by side; one on each GPU, or one.")] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Train nothing; table of what is done.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard cells whose settings changed.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train methods at equal budgets over several seeds, and put them side by side with intervals."""
    with reporting(as_json):
        ok = run_compare(
            grid,
            folder,
            data=data,
            workers=workers,
            table_only=table_only,
            overwrite=overwrite,
            as_json=as_json,
        )
        if not ok:
            raise typer.Exit(FAILURE)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder, or a packed model file.")],
    out: Annotated[Path, typer.Argument(help="File to write: .onnx, .qonnx.onnx, .npz or .pt2.")],
    format: Annotated[
        str | None, typer.Option(help="onnx, qonnx, arrays or program; by the name if not given.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="ONNX: 4-bit and 2-bit weights, packed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    factory: Annotated[str | None, typer.Option("--model", help="Architecture of a packed file.")] = None,
    arguments: Annotated[str, typer.Option("--kwargs", help="Arguments of the architecture, as YAML or JSON.")] = "{}",
    input_shape: Annotated[str | None, typer.Option(help="Shape of the input; a run's data say it.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a deployed model as ONNX, QONNX, plain arrays or a torch.export program."""
    with reporting(as_json):
        export_model(
            source,
            out,
            format=format,
            pack=pack,
            overwrite=overwrite,
            factory=factory,
            arguments=arguments,
            input_shape=input_shape,
            as_json=as_json,
        )


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a run: how far it is, its accuracies, its layers."""
    with reporting(as_json):
        show_run(folder, as_json=as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Exported files: .nipq.safetensors, .onnx, .npz, .pt2.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run's packed model and exported files with its trained model, layer by layer in integer codes."""
    with reporting(as_json):
        if not verify_folder(folder, files or [], as_json=as_json):
            raise typer.Exit(FAILURE)
