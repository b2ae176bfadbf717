"""Images made worse in seven ways and five severities, in plain torch.

In the spirit of ImageNet-C (arXiv 1903.12261), which names most of these; severities here are our own and go with the
size of the image, so that they mean the same for 28 and for 224 pixels. Images come standardised; black and white are
told as two numbers. Everything is computed between 0 and 1 and cut off there, as an 8-bit image would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from experiments.robustness.perturbation import Point, Scores, Sweep
from nipq.errors import ConfigError

Function = Callable[[Tensor, float, torch.Generator], Tensor]


def _gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return images + deviation * _like(images, torch.randn(images.shape, generator=generator))


def _impulse_noise(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the pixels black or white, all channels alike."""
    draw = _like(images, torch.rand((len(images), 1, *images.shape[2:]), generator=generator))
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, images))


def _blur(images: Tensor, deviation: float, _generator: torch.Generator) -> Tensor:
    """A Gaussian of so many 32nds of the image's side."""
    sigma = deviation * images.shape[-1] / 32
    radius = min(int(3 * sigma + 0.5), min(images.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1).to(images)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    wide = pad(images, (radius, radius, radius, radius), mode="replicate")
    wide = conv2d(wide, kernel, groups=images.shape[1])
    return conv2d(wide, kernel.transpose(2, 3), groups=images.shape[1])


def _contrast(images: Tensor, factor: float, _generator: torch.Generator) -> Tensor:
    """Distances from the image's mean shrink by a factor."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


def _brightness(images: Tensor, amount: float, _generator: torch.Generator) -> Tensor:
    return images + amount


def _pixelate(images: Tensor, share: float, _generator: torch.Generator) -> Tensor:
    """Square blocks of one colour, their side a share of the image's height."""
    height, width = images.shape[-2:]
    block = max(1, round(share * height))
    means = avg_pool2d(images, block, ceil_mode=True, count_include_pad=False)
    return means.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]


def _occlusion(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A grey square, its side a share of the image's, somewhere inside the image."""
    height, width = images.shape[-2:]
    inside = torch.ones(len(images), 1, height, width, dtype=torch.bool, device=images.device)
    for axis, side in ((2, height), (3, width)):
        length = max(1, round(share * side))
        start = torch.randint(0, side - length + 1, (len(images), 1), generator=generator).to(images.device)
        place = torch.arange(side, device=images.device)
        along = (place >= start) & (place < start + length)
        inside &= along.reshape([len(images), 1, *(side if i == axis else 1 for i in (2, 3))])
    return torch.where(inside, 0.5, images)


def _like(images: Tensor, drawn: Tensor) -> Tensor:
    return drawn.to(images)


#: Each corruption with its amounts at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Function, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.11, 0.18)),
    "blur": (_blur, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "contrast": (_contrast, (0.9, 0.8, 0.65, 0.5, 0.35)),
    "brightness": (_brightness, (0.03, 0.06, 0.1, 0.15, 0.25)),
    "pixelate": (_pixelate, (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4)),
    "occlusion": (_occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
}


def corrupt(images: Tensor, name: str, severity: int, *, black: float, white: float, seed: int = 0) -> Tensor:
    """Corrupt standardised images.

    Args:
        images: [N, C, H, W], black at ``black`` and white at ``white``.
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        black: value of black.
        white: value of white.
        seed: of what is random.

    Returns:
        New images between black and white, same shape and type.

    Raises:
        ConfigError: if the name or the severity is unknown, or white is not above black.

    Example:
        >>> corrupt(torch.zeros(1, 1, 2, 2), "brightness", 3, black=0.0, white=1.0).unique()
        tensor([0.1000])
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"corrupt: expected one of {', '.join(CORRUPTIONS)}, found {name!r}. Choose one.")
    function, amounts = CORRUPTIONS[name]
    if severity not in range(1, len(amounts) + 1):
        raise ConfigError(f"corrupt: expected a severity from 1 to {len(amounts)}, found {severity!r}. Choose one.")
    if not white > black:
        raise ConfigError(f"corrupt: expected white above black, found {white:g} and {black:g}. Exchange them.")
    unit = ((images - black) / (white - black)).clamp(0, 1)
    changed = function(unit, amounts[severity - 1], torch.Generator().manual_seed(seed)).clamp(0, 1)
    return black + (white - black) * changed


@dataclass(frozen=True)
class Corrupted:
    """Batches with corrupted images, the same every time they are read.

    Attributes:
        batches: ``(images, targets)``.
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        black: value of black.
        white: value of white.
        seed: of the first batch; the next ones count on.
    """

    batches: Iterable[Any]
    name: str
    severity: int
    black: float
    white: float
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Corrupted images and their targets."""
        for place, (images, targets) in enumerate(self.batches):
            seed = self.seed * 100_003 + place
            yield corrupt(images, self.name, self.severity, black=self.black, white=self.white, seed=seed), targets


def corruption_sweep(
    model: nn.Module,
    batches: Iterable[Any],
    scores: Scores,
    *,
    black: float,
    white: float,
    names: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
) -> Sweep:
    """Score a network on images that get worse.

    Args:
        model: any.
        batches: ``(images, targets)``, read many times.
        scores: of the model on batches.
        black: value of black in the images.
        white: value of white.
        names: keys of :data:`CORRUPTIONS`.
        severities: from 1 to 5.
        seed: of what is random.

    Returns:
        Points with ``corruption``, ``severity`` and ``seed``; the first has ``none`` and 0.
    """
    points = [Point({"corruption": "none", "severity": 0, "seed": seed}, scores(model, batches))]
    for name in names:
        for severity in severities:
            found = scores(model, Corrupted(batches, name, severity, black, white, seed))
            points.append(Point({"corruption": name, "severity": severity, "seed": seed}, found))
    return Sweep("corruption", tuple(points))


def value_range(batches: Iterable[Any]) -> tuple[float, float]:
    """Smallest and largest value in the images of batches: black and white of a data set that has both.

    Args:
        batches: ``(images, targets)``.

    Returns:
        Black and white.
    """
    ends = [(float(images.min()), float(images.max())) for images, _ in batches]
    return min(low for low, _ in ends), max(high for _, high in ends)
