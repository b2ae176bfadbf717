"""``nipq quantize``: a trained network of torchvision, timm or the user, quantized with a folder of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize
from nipq.cli.output import JsonFlag, answer, show
from nipq.cli.reporting import reporting
from nipq.errors import ConfigError, first_line, require
from nipq.files import check_free
from nipq.ptq.quantize import quantize
from nipq.train.config import ModelConfig
from nipq.train.data import DEVIATION, MEAN, RESIZE_RATIO
from nipq.train.factory import PUBLISHED, build_model, find_factory, read_state

#: Ends of the names of images that are read.
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

#: Images in a batch.
BATCH = 32

#: Shuffles the images, which folders sort by class.
SEED = 0


def quantize_command(
    model: Annotated[str, typer.Argument(help="torchvision or timm name, or package.module:factory.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images, in any subfolders.")],
    bits: Annotated[str | None, typer.Option(help="Average bits WEIGHTS/ACTIVATIONS, such as 4/8.")] = None,
    size: Annotated[str | None, typer.Option(help='Bytes of the packed file, such as "1.2 MB".')] = None,
    bit_ops: Annotated[str | None, typer.Option(help='Bit-operations per image, such as "5.3 G".')] = None,
    samples: Annotated[int, typer.Option(min=2, help="Images to measure with.")] = 256,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over all images to train with afterwards.")] = 0,
    labels: Annotated[
        bool, typer.Option("--labels", help="Train by the labels: sorted subfolders are the classes.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="State dict of the model; published ones if left out.")] = None,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the crop for a factory of your own.")] = 224,
    output: Annotated[Path | None, typer.Option(help="Packed file to write, *.nipq.safetensors.")] = None,
    export: Annotated[Path | None, typer.Option(help="File for other programs: .onnx, .npz or .pt2.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Quantize a trained network with a few hundred images, without labels or training."""
    with reporting(as_json):
        run_quantize(
            model,
            data,
            budget=parse_budget(bits, size, bit_ops),
            samples=samples,
            epochs=epochs,
            labels=labels,
            weights=weights,
            image_size=image_size,
            output=output,
            export=export,
            overwrite=overwrite,
            as_json=as_json,
        )


def run_quantize(
    name: str,
    data: Path,
    *,
    budget: Budget,
    samples: int,
    epochs: int,
    labels: bool,
    weights: Path | None,
    image_size: int,
    output: Path | None,
    export: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Quantize a model and print the report.

    Args:
        name: torchvision or timm name, or ``package.module:factory``.
        data: folder of images.
        budget: the limits.
        samples: images to measure with.
        epochs: of training afterwards.
        labels: train by the labels instead of towards the float model's outputs.
        weights: state dict of the model; None for the published one, or what the factory returns.
        image_size: side of the crop where the model does not say its own.
        output: packed file to write, or None.
        export: file for other programs to write, or None.
        overwrite: replace existing files.
        as_json: print JSON.

    Raises:
        ConfigError: if a file exists, the model is unknown, or the folder holds no images or unfit labels.
        As :func:`nipq.quantize`.
    """
    for path in (output, export):
        if path is not None:
            check_free(path, overwrite=overwrite, command="quantize")
    images = find_images(data)
    model, transform = load_network(name, weights, image_size)
    loader = ImageBatches(images, transform)
    if labels:
        loader = ImageBatches(images, transform, _classes(data, images))
        _check_classes(model, loader)
    console = Console(stderr=True)
    result = quantize(
        model,
        loader,
        budget,
        samples=samples,
        epochs=epochs,
        loss_fn=cross_entropy if labels and epochs else None,
        progress=None if as_json else lambda stage: console.print(f"[dim]{stage} ...[/]"),
    )
    files = {}
    if output is not None:
        files["output"] = str(result.save(output, overwrite=overwrite))
    if export is not None:
        files["export"] = str(result.export(export, overwrite=overwrite).path)
    if as_json:
        answer({"report": result.report.to_dict()} | files)
        return
    show(result.report, *(f"wrote {file}" for file in files.values()))


def parse_budget(bits: str | None, size: str | None, bit_ops: str | None) -> Budget:
    """The budget that the options ask for.

    Args:
        bits: ``"4/8"``, average bits of weights and activations; one number for both.
        size: bytes of the packed file.
        bit_ops: bit-operations of one image.

    Returns:
        All of them joined.

    Raises:
        ConfigError: if none is given, or one cannot be read.

    Example:
        >>> parse_budget("4/8", "1.2 MB", None)
        AverageBits(weights=4.0, activations=8.0, mode='bound') & ModelSize(size='1.2 MB', mode='bound')
    """
    parts: list[Budget] = []
    if bits is not None:
        try:
            numbers = [float(part) for part in bits.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(math.isfinite(number) for number in numbers):
            raise ConfigError(
                f"--bits: expected WEIGHTS/ACTIVATIONS such as 4/8, found {bits!r}. Give numbers of bits."
            )
        parts.append(AverageBits(weights=numbers[0], activations=numbers[-1]))
    if size is not None:
        parts.append(ModelSize(size))
    if bit_ops is not None:
        parts.append(BitOps(bit_ops))
    if not parts:
        raise ConfigError("expected a budget, found none. Give --bits 4/8, --size or --bit-ops.")
    return reduce(and_, parts)


def find_images(folder: Path) -> list[Path]:
    """Images below a folder, sorted by path.

    Args:
        folder: with images in any subfolders.

    Raises:
        ConfigError: if there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        what = "no images" if folder.is_dir() else "no such folder"
        raise ConfigError(f"--data: expected a folder of images ({', '.join(IMAGES)}), found {what} at {folder}.")
    return found


Transform = Callable[[Any], Tensor]


def load_network(name: str, weights: Path | None, image_size: int) -> tuple[nn.Module, Transform]:
    """A trained network and its own preprocessing.

    Args:
        name: torchvision or timm name, or ``package.module:factory``.
        weights: state dict; None for the published one, or for what the factory returns.
        image_size: side of the crop, for a factory or where nothing is published.

    Returns:
        The network on the CPU in evaluation mode, and a function from a PIL image to its input.

    Raises:
        ConfigError: if the name is unknown, or weights cannot be had.
        FileFormatError: if the file holds other weights.
    """
    models = require("torchvision.models", extra="vision", purpose="images")
    file = None if weights is None else str(weights)
    if ":" in name:
        return build_model(ModelConfig(factory=name, weights=file)).eval(), _usual(image_size)
    if name in models.list_models():
        model = build_model(ModelConfig(factory=name, weights=file or PUBLISHED))
        return model.eval(), models.get_model_weights(name).DEFAULT.transforms()
    timm = require("timm", extra="tasks", purpose=f"the network {name!r}, which torchvision does not know")
    if not timm.is_model(name):
        find_factory(name)  # raises with similar names
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: expected timm's published weights, found that they cannot be fetched ({first_line(error)}). "
            "Give a state dict with --weights."
        ) from error
    if weights is not None:
        try:
            model.load_state_dict(read_state(weights))
        except RuntimeError as error:
            raise ConfigError(f"--weights: expected weights of {name}, found others: {error}. Give its own.") from error
    config = timm.data.resolve_model_data_config(model)
    return model.eval(), timm.data.create_transform(**config, is_training=False)


@dataclass(frozen=True)
class ImageBatches:
    """Images of a folder in batches, in one shuffled order, decoded anew at each pass.

    Attributes:
        images: paths.
        transform: from a PIL image to the model's input.
        classes: class of each image, or None for batches without labels.
    """

    images: list[Path]
    transform: Transform
    classes: list[int] | None = None

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // BATCH)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Batches of inputs, with labels where there are some."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(SEED)).tolist()
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = torch.stack([self.load(self.images[place]) for place in chosen])
            if self.classes is None:
                yield inputs
            else:
                yield inputs, torch.tensor([self.classes[place] for place in chosen])

    def load(self, path: Path) -> Tensor:
        """One image as the model's input, without a batch dimension.

        Args:
            path: of ``images``.

        Raises:
            ConfigError: if it cannot be read.
        """
        image = require("PIL.Image", extra="vision", purpose="images")
        try:
            with image.open(path) as opened:
                return self.transform(opened.convert("RGB"))
        except OSError as error:
            raise ConfigError(
                f"{path}: expected an image, found that it cannot be read: {error}. Remove it."
            ) from error


def _usual(size: int) -> Transform:
    """ImageNet's usual evaluation transform."""
    transforms = require("torchvision.transforms", extra="vision", purpose="images")
    found: Transform = transforms.Compose(
        [
            transforms.Resize(round(size * RESIZE_RATIO)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return found


@torch.no_grad()
def _check_classes(model: nn.Module, loader: ImageBatches) -> None:
    assert loader.classes is not None
    outputs = model(loader.load(loader.images[0])[None])
    found = 1 + max(loader.classes)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] != found:
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(
            f"--labels: expected as many subfolders as the model has classes, found {found} for outputs {shape}. "
            "Leave --labels out to train towards the float model's outputs."
        )


def _classes(folder: Path, images: list[Path]) -> list[int]:
    """Class of each image: the place of its first subfolder among the sorted ones."""
    names = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in images]
    if None in names:
        raise ConfigError(
            f"--labels: expected every image in a subfolder of {folder} that is its class, found "
            f"{images[names.index(None)].name} beside them. Move it, or leave --labels out."
        )
    order = {name: number for number, name in enumerate(sorted({str(name) for name in names}))}
    return [order[str(name)] for name in names]
