"""``nipq inspect``: layers and reachable budgets of a model before anything is done to it."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from nipq.cli.output import JsonFlag, TargetOption, answer, show
from nipq.cli.reporting import reporting
from nipq.config import Config
from nipq.errors import ConfigError
from nipq.report.inspect import inspect
from nipq.train.config import ModelConfig, parse_overrides
from nipq.train.factory import build_model


def inspect_model(
    factory: Annotated[str, typer.Argument(help="torchvision name, or package.module:callable.")],
    input_shape: Annotated[str, typer.Option(help="Shape of the input, batch first.")] = "1,3,224,224",
    arguments: Annotated[str, typer.Option("--kwargs", help="Arguments of the factory, as YAML or JSON.")] = "{}",
    target: TargetOption = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Promise the bytes of ONNX files, too; a minute or two.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List a model's layers, what stays float and why, and the budgets within reach; weights are random."""
    with reporting(as_json):
        config, shape = Config(target=target), parse_shape(input_shape)
        model = build_model(ModelConfig(factory=factory, kwargs=parse_kwargs(arguments))).eval()
        # Noise, and not zeros: the kinds of grid, on which an ONNX file's size depends, are chosen by values.
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model(example)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model {factory!r} cannot take an input of shape {shape}: {error}; correct --input-shape"
            ) from error
        found = inspect(model, example, config, onnx=onnx)
        if as_json:
            answer(found.to_dict())
        else:
            show(found)


def parse_kwargs(text: str) -> dict[str, Any]:
    """Read a factory's arguments.

    Args:
        text: a mapping, as YAML or JSON.

    Returns:
        The arguments.

    Raises:
        ConfigError: if the text is no mapping.

    Example:
        >>> parse_kwargs("{num_classes: 10}")
        {'num_classes': 10}
    """
    kwargs = parse_overrides([f"kwargs={text}"])["kwargs"] or {}
    if not isinstance(kwargs, dict):
        raise ConfigError(f"expected --kwargs to be a mapping such as '{{num_classes: 10}}', found {text!r}")
    return kwargs


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape.

    Args:
        text: whole numbers with commas.

    Returns:
        The shape.

    Raises:
        ConfigError: if a part is not a whole number above zero.

    Example:
        >>> parse_shape("1,3,224,224")
        (1, 3, 224, 224)
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"expected a shape such as 1,3,224,224, found {text!r}; give whole numbers, batch first")
    return tuple(int(part) for part in parts)
