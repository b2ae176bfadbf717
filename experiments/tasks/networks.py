"""Networks of the tasks, fitted to their small images: MobileNet-v3 and ResNet of torchvision, and an EDSR."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from nipq.train.models import NarrowResNet

MOBILENET_V3_32 = (
    (16, 3, 16, 16, True, "RE", 2),
    (16, 3, 72, 24, False, "RE", 2),
    (24, 3, 88, 24, False, "RE", 1),
    (24, 5, 96, 40, True, "HS", 2),
    (40, 5, 160, 40, True, "HS", 1),
    (40, 5, 120, 48, True, "HS", 1),
)
"""Blocks of the small MobileNet-v3: channels in, kernel, channels between, channels out, squeeze-and-excite, ReLU or
hardswish, stride."""


def mobilenet_v3_32(classes: int = 71, stem_stride: int = 2, head: int = 192) -> MobileNetV3:
    """MobileNet-v3 small of torchvision for 32x32 images: fewer blocks and strides, a narrow head, no dropout.

    Args:
        classes: Number of answers.
        stem_stride: Stride of the first convolution; 1 makes the net four times dearer than 2.
        head: Channels of the hidden linear layer.

    Returns:
        The net, untrained.
    """
    rows = [
        InvertedResidualConfig(cin, kernel, mid, cout, excite, act, stride, dilation=1, width_mult=1.0)
        for cin, kernel, mid, cout, excite, act, stride in MOBILENET_V3_32
    ]
    # torchvision's momentum of 0.01 goes with far longer training: running statistics would lag behind.
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    net = MobileNetV3(rows, last_channel=head, num_classes=classes, norm_layer=norm, dropout=0.0)
    net.features[0][0].stride = (stem_stride, stem_stride)
    return net


def resnet18_32(width: int = 16, classes: int = 71, stem_stride: int = 2) -> NarrowResNet:
    """ResNet-18 of torchvision for 32x32 colour images: a 3x3 stem without pooling, and narrower stages.

    Args:
        width: Channels of the first stage (the original has 64); the last has eight times as many.
        classes: Number of answers.
        stem_stride: Stride of the first convolution; 1 makes the net four times dearer than 2.

    Returns:
        The net, untrained.
    """
    net = NarrowResNet(width, [2, 2, 2, 2], classes, stem_stride)
    net.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, and the input added: EDSR's block, without batch norm.

    Args:
        channels: In and out.
    """

    def __init__(self, channels: int) -> None:
        """Build the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = x + self.conv2(self.relu(self.conv1(x)))
        return out


class Edsr(nn.Module):
    """Doubles an image's sides: residual blocks at the small size, a pixel shuffle, and the bicubic image added.

    EDSR (Lim et al., 2017) made small; its global skip is the bicubic image, so the network learns what that one lacks.

    Args:
        channels: Of the residual blocks.
        blocks: How many.
    """

    def __init__(self, channels: int = 16, blocks: int = 4) -> None:
        """Build the layers."""
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, 1, 1)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.fuse = nn.Conv2d(channels, channels, 3, 1, 1)
        self.tail = nn.Conv2d(channels, 3 * 4, 3, 1, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to [N, 3, 2H, 2W]."""
        features = self.head(x)
        features = features + self.fuse(self.body(features))
        detail: Tensor = self.shuffle(self.tail(features))
        return interpolate(x, scale_factor=2, mode="bicubic", align_corners=False) + detail


def edsr(channels: int = 16, blocks: int = 4) -> Edsr:
    """A small EDSR for x2 super-resolution; the published one has 16 or 32 blocks of 64 or 256 channels.

    Args:
        channels: Of the residual blocks.
        blocks: How many.

    Returns:
        The net, untrained.
    """
    return Edsr(channels, blocks)
