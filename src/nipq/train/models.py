"""Networks and tasks by name or import path, their weights, and small networks of this package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import Conv2dNormActivation

from nipq.errors import ConfigError, FileFormatError, require
from nipq.train.task import Classification, Task

if TYPE_CHECKING:
    from nipq.train.config import ModelConfig, TrainConfig

#: Expansion, channels, repeats and first stride of MobileNet-v2's stages for 28x28 images.
SMALL_MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 1), (6, 96, 1, 1))


class SeparableBlock(nn.Module):
    """Depthwise 3x3 then pointwise convolution, each with batch-norm; a residual when shapes allow.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: of the depthwise convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        """Build the layers."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, H/stride, W/stride]."""
        y = self.relu(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        out: Tensor = self.relu(x + y if self.residual else y)
        return out


class DigitsNet(nn.Module):
    """A residual depthwise-separable net for 8x8 gray images.

    Args:
        width: channels of the first stage; the second has twice as many.
        classes: number of answers.
    """

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        """Build the layers."""
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(
            SeparableBlock(width, width),
            SeparableBlock(width, 2 * width, stride=2),
            SeparableBlock(2 * width, 2 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 8, 8] to logits [N, classes]."""
        x = self.relu(self.stem_norm(self.stem(x)))
        out: Tensor = self.classifier(self.pool(self.blocks(x)).flatten(1))
        return out


def digits_net(width: int = 32, classes: int = 10) -> DigitsNet:
    """The net of the demo: 8x8 gray digits, about 99 % in seconds on a CPU.

    Args:
        width: channels of the first stage.
        classes: number of answers.

    Returns:
        The net, untrained.
    """
    return DigitsNet(width, classes)


def mobilenet_v2_28(
    width_mult: float = 0.5,
    classes: int = 10,
    stem_stride: int = 1,
    stages: Any = SMALL_MOBILENET,  # noqa: ANN401
    head: int = 1280,
) -> MobileNetV2:
    """MobileNet-v2 of torchvision for 28x28 gray images: one input channel, fewer stages, fewer strides, no dropout.

    Args:
        width_mult: factor on every number of channels.
        classes: number of answers.
        stem_stride: stride of the first convolution; 2 makes the net about four times cheaper.
        stages: rows of expansion, channels, repeats and first stride.
        head: channels of the last convolution, which torchvision never makes narrower than 1280.

    Returns:
        The net, untrained.
    """
    net = MobileNetV2(
        num_classes=classes, width_mult=width_mult, inverted_residual_setting=[list(row) for row in stages], dropout=0.0
    )
    last = net.features[-1][0].in_channels
    net.features[-1] = Conv2dNormActivation(last, head, kernel_size=1, activation_layer=nn.ReLU6)
    net.classifier[-1] = nn.Linear(head, classes)
    stem = net.features[0][0]
    net.features[0][0] = _stem(stem.out_channels, stem_stride)
    return net


class NarrowResNet(ResNet):  # type: ignore[misc]  # untyped base
    """torchvision's ResNet with its 64 base channels replaced by another number.

    Args:
        width: channels of the first stage.
        layers: blocks per stage.
        classes: number of answers.
        stem_stride: stride of the first convolution.
    """

    def __init__(self, width: int, layers: list[int], classes: int, stem_stride: int) -> None:
        """Build the layers; the stem and the head are fitted to the width afterwards."""
        self._width = width
        super().__init__(BasicBlock, layers, num_classes=classes)
        self.conv1 = _stem(width, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width, classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:  # noqa: ANN401
        if planes == 64:
            self.inplanes = self._width
        stage: nn.Sequential = super()._make_layer(block, planes * self._width // 64, *args, **kwargs)
        return stage


def resnet18_28(
    width: int = 16, classes: int = 10, stem_stride: int = 1, layers: tuple[int, ...] = (2, 2, 2, 2)
) -> NarrowResNet:
    """ResNet-18 of torchvision for 28x28 gray images: a 3x3 stem without pooling, and narrower stages.

    Args:
        width: channels of the first stage (the original has 64); the last has eight times as many.
        classes: number of answers.
        stem_stride: stride of the first convolution; 2 makes the net about four times cheaper.
        layers: blocks per stage.

    Returns:
        The net, untrained.
    """
    return NarrowResNet(width, list(layers), classes, stem_stride)


def _stem(channels: int, stride: int) -> nn.Conv2d:
    stem = nn.Conv2d(1, channels, 3, stride, 1, bias=False)
    torch.nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


#: Stands for the weights that torchvision publishes.
PUBLISHED = "DEFAULT"


def build_model(config: ModelConfig, *, with_weights: bool = True) -> nn.Module:
    """Build the network that a config names and load its weights.

    Args:
        config: the ``model`` or ``teacher`` section.
        with_weights: ``False`` leaves the random start, for a state dict that follows.

    Returns:
        The network on the CPU.

    Raises:
        ConfigError: if the factory is unknown or refuses its arguments, or published weights cannot be had.
        FileFormatError: if a weights file is not a state dict of this network.
    """
    factory = find_factory(config.factory)
    try:
        model = factory(**config.kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model factory {config.factory!r} refused the arguments {config.kwargs}: {error}; correct model.kwargs"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model factory {config.factory!r} must return a module, it gave {type(model).__name__}")
    if with_weights and config.weights is not None:
        state = _published(config.factory) if config.weights == PUBLISHED else read_state(Path(config.weights))
        _load(model, state, config)
    return model


def find_factory(name: str) -> Callable[..., Any]:
    """Find the callable behind a torchvision model's name or ``package.module:callable``; else ConfigError."""
    if ":" in name:
        return import_callable(name, "model factory")
    models = require("torchvision.models", extra="vision", purpose="torchvision's networks")
    try:
        builder: Callable[..., Any] = models.get_model_builder(name)
    except ValueError as error:
        close = [known for known in models.list_models(models) if name[:4].lower() in known]
        raise ConfigError(
            f"no torchvision model {name!r} (similar: {', '.join(close[:6]) or 'none'}); "
            "give a torchvision name or package.module:callable"
        ) from error
    return builder


def import_callable(path: str, what: str) -> Callable[..., Any]:
    """Import ``package.module:callable``; ``what`` is its role, for the message of the ConfigError if there is none."""
    module_name, _, attribute = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no {what} {path!r}: {error}; give package.module:callable") from error
    return found


def build_task(config: TrainConfig) -> Task:
    """Build the task of a run; ConfigError if there is none, or its callable returns something else."""
    if config.task == "classification":
        temperature = 1.0 if config.teacher is None else config.teacher.temperature
        return Classification(config.label_smoothing, temperature)
    task = import_callable(config.task, "task")(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task {config.task!r} must return a Task, it gave {type(task).__name__}")
    return task


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running anything stored in it.

    Args:
        path: a ``.safetensors`` file, or a torch file that holds a state dict, plain or under ``state_dict``/``model``.

    Returns:
        Tensors by name.

    Raises:
        ConfigError: if there is no such file.
        FileFormatError: if the file is something else.
    """
    if not path.is_file():
        raise ConfigError(f"expected a weights file, found nothing at {path}; correct model.weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(f"expected a state dict in {path}, found something else: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(
            f"expected a dict of tensors in {path}, found {type(state).__name__}; save model.state_dict()"
        )
    return state


def _published(name: str) -> dict[str, Tensor]:
    """The default weights that torchvision publishes, from its cache or the network."""
    models = require("torchvision.models", extra="vision", purpose="published weights")
    try:
        url = models.get_model_weights(name).DEFAULT.url
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"torchvision publishes no weights for {name!r}; give model.weights a file or null"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.is_file():
        return read_state(file)
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the published weights of {name!r} are not in the cache and could not be fetched ({_first_line(error)}); "
            f"fetch {url} on a connected machine and put it at {file}, or give its path as weights"
        ) from error
    return state


def _load(model: nn.Module, state: dict[str, Tensor], config: ModelConfig) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileFormatError(
            f"the weights {config.weights!r} are not those of {config.factory!r} with {config.kwargs}: {error}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
