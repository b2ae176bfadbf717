"""Ten classes of 32x32 colour images, made offline: scikit-learn's digits on crops of its two sample photographs.

Digits and areas of the photographs are shared out before anything is drawn, so that training, validation and test have
neither a digit nor a pixel of a photograph in common. The same seed gives the same images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate

#: Images of each part.
SIZES = {"train": 5000, "validation": 3000, "test": 4000}
#: Turns in which the digits of a class, and the tiles of a row of a photograph, are dealt to the parts; the rows of
#: tiles begin their turn at different places. Crops stay inside a tile.
TURN = ("train", "test", "train", "validation", "train", "train", "test", "train", "train", "validation")
TILE, SIDE, ROW_START = 64, 32, 3
#: Largest shift of a digit in pixels; range of its size in pixels and of its opacity; noise of the sensor.
SHIFT, DIGIT_SIDE, OPACITY, SENSOR = 2.5, (25.0, 30.0), (0.75, 1.0), 0.03


@dataclass(frozen=True)
class Images:
    """Images and classes.

    Attributes:
        inputs: float32, (N, 3, 32, 32), about mean 0 and variance 1.
        targets: int64, (N,).
    """

    inputs: Tensor
    targets: Tensor


def colour_digits(seed: int = 0) -> dict[str, Images]:
    """Draw all three parts.

    Args:
        seed: of what is drawn; who gets which digit and which area does not depend on it.

    Returns:
        Images by ``"train"``, ``"validation"`` and ``"test"``.
    """
    parts = {}
    for number, (part, size) in enumerate(SIZES.items()):
        rng = np.random.default_rng([seed, number])
        parts[part] = _draw(part, size, rng)
    return parts


def gray_digits() -> dict[str, Images]:
    """Scikit-learn's digits as they are, 8x8 and gray, dealt to the same parts; standardised by the training digits."""
    digits, owners = load_digits(), digit_parts()
    pixels = torch.from_numpy(digits.images).float()[:, None]
    own = pixels[torch.from_numpy(owners == "train")]
    pixels = (pixels - own.mean()) / own.std()
    places = {part: torch.from_numpy(np.flatnonzero(owners == part)) for part in SIZES}
    targets = torch.from_numpy(digits.target).long()
    return {part: Images(pixels[place], targets[place]) for part, place in places.items()}


def digit_parts() -> NDArray[np.str_]:
    """The part of each of scikit-learn's digits, dealt in turns within a class."""
    targets = load_digits().target
    parts = np.empty(len(targets), dtype="<U10")
    for digit in range(10):
        places = np.flatnonzero(targets == digit)
        parts[places] = np.array(TURN)[np.arange(len(places)) % len(TURN)]
    return parts


def _draw(part: str, size: int, rng: np.random.Generator) -> Images:
    digits = load_digits()
    own = np.flatnonzero(digit_parts() == part)
    chosen = rng.choice(own, size)
    shapes = torch.from_numpy(digits.images[chosen]).float()[:, None] / 16
    behind = _crops(part, size, rng)
    covered = _placed(shapes, rng) * _column(rng.uniform(*OPACITY, size))
    colour = torch.from_numpy(rng.uniform(0, 1, (size, 3, 1, 1))).float()
    # A colour too near the background's is moved to the other end of each channel.
    mean = behind.mean((2, 3), keepdim=True)
    colour = torch.where((colour - mean).abs().mean(1, keepdim=True) < 0.3, (mean + 0.5) % 1, colour)
    contrast, bright = _column(rng.uniform(0.6, 1.0, size)), _column(rng.uniform(-0.15, 0.15, size))
    image = (1 - covered) * behind + covered * colour
    image = (image - 0.5) * contrast + 0.5 + bright
    image = image + SENSOR * torch.from_numpy(rng.standard_normal(image.shape)).float()
    return Images(((image.clamp(0, 1) - 0.45) / 0.25).contiguous(), torch.from_numpy(digits.target[chosen]).long())


def _crops(part: str, size: int, rng: np.random.Generator) -> Tensor:
    """Random crops of both photographs, inside the tiles of one part, half of them mirrored."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    rows, columns = (side // TILE for side in photos[0].shape[1:])
    tiles = [(r, c) for r in range(rows) for c in range(columns) if TURN[(c + ROW_START * r) % len(TURN)] == part]
    crops = []
    for _ in range(size):
        photo = photos[rng.integers(len(photos))]
        corner = TILE * np.array(tiles[rng.integers(len(tiles))]) + rng.integers(TILE - SIDE + 1, size=2)
        top, left = corner.tolist()
        crop = photo[:, top : top + SIDE, left : left + SIDE]
        crops.append(crop.flip(2) if rng.random() < 0.5 else crop)
    return torch.stack(crops)


def _placed(shapes: Tensor, rng: np.random.Generator) -> Tensor:
    """Digits enlarged, scaled and shifted onto the canvas, (N, 1, 32, 32) from 0 to 1."""
    size = len(shapes)
    large = interpolate(shapes, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    scale = torch.from_numpy(SIDE / rng.uniform(*DIGIT_SIDE, size)).float()
    shift = torch.from_numpy(rng.uniform(-SHIFT, SHIFT, (size, 2)) * 2 / SIDE).float()
    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = -shift * scale[:, None]
    grid = nn.functional.affine_grid(theta, [size, 1, SIDE, SIDE], align_corners=False)
    return grid_sample(large, grid, padding_mode="zeros", align_corners=False)


def _column(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).float()[:, None, None, None]


def small_cnn() -> nn.Sequential:
    """Five convolutions with batch norm and ReLU, three of them with stride 2; global pooling; one linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for channels, stride in ((16, 2), (32, 1), (32, 2), (64, 1), (64, 2)):
        layers += [nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
