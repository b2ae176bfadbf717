"""``nipq export`` and ``nipq verify``: files for other programs, and their comparison with the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

from nipq.cli.inspection import parse_kwargs, parse_shape
from nipq.cli.output import FAILURE, JsonFlag, answer, show
from nipq.cli.reporting import reporting
from nipq.errors import ConfigError
from nipq.export.api import Format, export
from nipq.export.packed_read import load
from nipq.train.batches import pick
from nipq.train.config import ModelConfig
from nipq.train.data import load_data
from nipq.train.factory import build_model, check_trusted
from nipq.train.pipeline import verify_run
from nipq.train.run_folder import RunFolder, reading

#: Lets a command import what a run folder names.
TrustFlag = Annotated[
    bool, typer.Option("--trust", help="The run folder is one's own: import the code that its config names.")
]


def export_model(
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
    trust: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a deployed model as ONNX, QONNX, plain arrays or a torch.export program."""
    with reporting(as_json):
        if source.is_dir():
            place = RunFolder(source)
            check_trusted(place.read_config(), str(source), trust=trust)
            deployed, example = _from_run(place, input_shape, pack=pack)
        else:
            deployed, example = _from_file(source, factory, arguments, input_shape)
        report = export(deployed, out, example, format=cast("Format | None", format), pack=pack, overwrite=overwrite)
        if as_json:
            answer(report.to_dict())
        else:
            show(report)


def _from_run(place: RunFolder, input_shape: str | None, *, pack: bool) -> tuple[nn.Module, Any]:
    """Model and example inputs of a finished run."""
    config = place.read_config()
    if pack and config.quantization.target == "openvino":
        raise ConfigError(
            f"expected no --pack for a run of target 'openvino', found it with {place.path}: OpenVINO computes packed "
            "weights in floats, and cannot read those of 2 bits; leave --pack out"
        )
    if not place.model.is_file() or not place.results.is_file():
        raise ConfigError(
            f"expected a finished run, found an unfinished one in {place.path}; continue it with --resume"
        )
    with reading(place.results):
        verified = place.read(place.results, dict)["verified"]
    if not verified:
        raise ConfigError(
            f"expected a deployed model that equals the trained one, found in {place.results} that it does not; "
            "see nipq verify"
        )
    deployed = load(place.model, build_model(config.model, with_weights=False))
    if input_shape is not None:
        return deployed, torch.zeros(parse_shape(input_shape))
    return deployed, pick(next(iter(load_data(config.data, config.seed).test))[0], slice(1))


def _from_file(
    path: Path, factory: str | None, arguments: str, input_shape: str | None
) -> tuple[nn.Module, torch.Tensor]:
    """Model of a packed file, and example inputs."""
    if factory is None or input_shape is None:
        raise ConfigError(
            f"expected --model and --input-shape with the file {path}, found {factory} and {input_shape}; "
            "a packed file does not know its architecture, a run folder does"
        )
    model = build_model(ModelConfig(factory=factory, kwargs=parse_kwargs(arguments)))
    return load(path, model), torch.zeros(parse_shape(input_shape))


def verify_files(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Exported files: .nipq.safetensors, .onnx, .npz, .pt2.")
    ] = None,
    trust: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run's packed model and exported files with its trained model, layer by layer in integer codes."""
    with reporting(as_json):
        place = RunFolder(folder)
        check_trusted(place.read_config(), str(folder), trust=trust)
        outcome = verify_run(place, files or [])
        if as_json:
            answer(outcome.to_dict(), ok=bool(outcome))
        else:
            show(outcome.table())
        if not outcome:
            raise typer.Exit(FAILURE)
