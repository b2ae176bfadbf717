"""Small networks for small images: MobileNet-v2 and ResNet of torchvision fitted to 28x28, and a net for digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import Conv2dNormActivation

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
