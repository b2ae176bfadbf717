"""``nipq inspect``: a model before anything is done to it."""

from __future__ import annotations

from typing import Any

import torch
import typer

from nipq.cli.output import answer
from nipq.config import Config
from nipq.errors import ConfigError
from nipq.report.inspect import inspect
from nipq.train.config import ModelConfig, parse_overrides
from nipq.train.factory import build_model


def show_inspection(
    factory: str, input_shape: str, arguments: str, *, target: str | None, onnx: bool, as_json: bool
) -> None:
    """Build a model with random weights and print what :func:`nipq.report.inspect.inspect` finds.

    Args:
        factory: torchvision name, or ``package.module:callable``.
        input_shape: Whole numbers with commas, batch first.
        arguments: Arguments of the factory, as YAML or JSON.
        target: Runtime to deploy on, or ``None``.
        onnx: Promise the bytes of ONNX files, too.
        as_json: Print JSON.

    Raises:
        ConfigError: If model or target are unknown, or shape or arguments cannot be read or do not fit.
    """
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
        typer.echo(str(found))


def parse_kwargs(text: str) -> dict[str, Any]:
    """Read a factory's arguments.

    Args:
        text: A mapping, as YAML or JSON.

    Returns:
        The arguments.

    Raises:
        ConfigError: If the text is no mapping.

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
        text: Whole numbers with commas.

    Returns:
        The shape.

    Raises:
        ConfigError: If a part is not a whole number above zero.

    Example:
        >>> parse_shape("1,3,224,224")
        (1, 3, 224, 224)
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"expected a shape such as 1,3,224,224, found {text!r}; give whole numbers, batch first")
    return tuple(int(part) for part in parts)
