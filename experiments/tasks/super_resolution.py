"""Twice the resolution: textured 64x64 patches of photographs, and their bicubic 32x32 halves to make them from.

Every eighth photograph is for the test and every eighth for validation, so no scene is in two splits. Quality is the
peak signal-to-noise ratio of the luma channel (ITU-R BT.601), without a border of two pixels, averaged over patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from experiments.tasks.cache import Arrays
from experiments.tasks.photos import cached, pixels, tiles
from nipq.functional.counter_rng import seed_of
from nipq.train.batches import Batch, Sources, Split
from nipq.train.task import Task, predictions

if TYPE_CHECKING:
    from pathlib import Path

    from nipq.train.config import DataConfig, TrainConfig

SIZE = 64
SHORT_SIDE = 640
#: Most patches of one photograph.
PATCHES = 64
#: Least mean absolute difference of neighbouring pixels of a patch; bicubic is perfect on blur.
SHARPNESS = 4.0
#: Side of the part of a small patch that a training step sees.
CROP = 24
#: Of every eight photographs in the list, the place of the one for the test and of the one for validation.
EVERY, TEST, VALIDATION = 8, 3, 7
BORDER = 2


def data(config: DataConfig, seed: int) -> Sources:
    """The splits; patches are cut on the first call and cached beside the photographs.

    Args:
        config: The ``data`` section; ``path`` is the folder of photographs. ``validation: 0`` trains on the photographs
            that are otherwise held out.
        seed: Decides which patches ``train_limit`` keeps.

    Returns:
        Small and large patches [N, 3, 32, 32] and [N, 3, 64, 64], as pixel / 255 - 1/2.

    Raises:
        ConfigError: If photographs are missing.
    """
    arrays = cached(config.path, "super_resolution", (SIZE, SHORT_SIDE, PATCHES, SHARPNESS), cut)
    small, large, photo = (torch.from_numpy(arrays[key]) for key in ("small", "large", "photo"))
    test, held_out = photo % EVERY == TEST, photo % EVERY == VALIDATION
    train = (~test & ~held_out if config.validation else ~test).nonzero()[:, 0]
    if config.train_limit is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]

    def split(which: Tensor) -> PatchSplit:
        return PatchSplit(small[which], large[which], config)

    return Sources(split(train), split(held_out) if config.validation else None, split(test))


def cut(photos: list[Path]) -> Arrays:
    """Cut the patches of every photograph, and the same places from its half-sized copy.

    Args:
        photos: The photographs.

    Returns:
        ``small`` [N, 3, 32, 32] and ``large`` [N, 3, 64, 64] uint8, and the number ``photo`` of each one's photograph.
    """
    parts: dict[str, list[Any]] = {"small": [], "large": [], "photo": []}
    draw = np.random.default_rng(0)
    for number, path in enumerate(photos):
        photo = pixels(path, SHORT_SIDE)
        height, width = (length // SIZE * SIZE for length in photo.shape[:2])
        photo = photo[:height, :width]
        half = Image.fromarray(photo).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        small, large = tiles(np.asarray(half), SIZE // 2), tiles(photo, SIZE)
        sharpness = np.abs(np.diff(large.astype(np.int16), axis=2)).mean((1, 2, 3))
        kept = np.sort(draw.permutation(np.flatnonzero(sharpness >= SHARPNESS))[:PATCHES])
        parts["small"].append(small[kept])
        parts["large"].append(large[kept])
        parts["photo"].append(np.full(len(kept), number))
    arrays = {key: np.concatenate(part) for key, part in parts.items()}
    return {key: array.transpose(0, 3, 1, 2) if array.ndim == 4 else array for key, array in arrays.items()}


class PatchSplit(Split):
    """Pairs of patches in memory.

    Args:
        small: [N, 3, h, w] uint8.
        large: [N, 3, 2h, 2w] uint8.
        config: Batch sizes, and whether training crops are turned and mirrored.
    """

    def __init__(self, small: Tensor, large: Tensor, config: DataConfig) -> None:
        """Keep the tensors as bytes."""
        self.small = small
        self.large = large
        self.batch_size = min(config.batch_size, len(small))
        self.eval_batch_size = config.eval_batch_size
        self.augment = config.augment

    def __iter__(self) -> Iterator[Batch]:
        """Whole patches in the stored order."""
        for small, large in zip(
            torch.split(self.small, self.eval_batch_size), torch.split(self.large, self.eval_batch_size), strict=True
        ):
            yield centred(small), centred(large)

    def __len__(self) -> int:
        """Number of training batches in an epoch."""
        return len(self.small) // self.batch_size

    def epoch(self, key: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled batches of crops; a batch is cut at one place and turned one way."""
        order = torch.randperm(len(self.small), generator=torch.Generator().manual_seed(key))
        room = self.small.shape[-1] - CROP
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            generator = torch.Generator().manual_seed(seed_of(key, index))
            top, left = torch.randint(0, room + 1, (2,), generator=generator).tolist() if self.augment else (0, 0)
            turns, mirrored = torch.randint(0, 4, (2,), generator=generator).tolist() if self.augment else (0, 0)
            pair = []
            for patches, scale in ((self.small, 1), (self.large, 2)):
                rows, columns = (slice(scale * at, scale * (at + CROP)) for at in (top, left))
                crop = centred(patches[chosen, :, rows, columns]).rot90(turns, (2, 3))
                pair.append((crop.flip(-1) if mirrored % 2 else crop).contiguous())
            yield pair[0], pair[1]


def centred(pixel: Tensor) -> Tensor:
    """Bytes as numbers in [-1/2, 1/2]."""
    return pixel.float() / 255 - 0.5


class SuperResolution(Task):
    """Mean absolute difference to the true patch; distillation is the same to the teacher's."""

    metric = "psnr"
    unit = "dB"
    higher_is_better = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean absolute difference."""
        return l1_loss(outputs, targets)

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Mean absolute difference to the teacher's patch."""
        return l1_loss(outputs, teacher_outputs)

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss and mean luma PSNR over patches."""
        loss, quality, count = 0.0, 0.0, 0
        for outputs, large in predictions(model, batches):
            loss += float(l1_loss(outputs.float(), large)) * len(large)
            quality += float(psnr(outputs.float(), large).sum())
            count += len(large)
        return {"loss": loss / count, "psnr": quality / count, "count": count}


def psnr(outputs: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the luma channel, without the border.

    ``10 log10(255^2 / mean (Y - Y')^2)`` with ``Y = 16 + 65.481 R + 128.553 G + 24.966 B`` and R, G, B in [0, 1];
    outputs are rounded to bytes first.

    Args:
        outputs: RGB in [-1/2, 1/2], [N, 3, H, W]; what is beyond is clipped.
        truth: The same.

    Returns:
        Decibels, [N].
    """
    weights = torch.tensor([65.481, 128.553, 24.966], device=truth.device)
    rounded = (outputs + 0.5).clamp(0, 1).mul(255).round() / 255 - 0.5
    difference = torch.einsum("nchw,c->nhw", rounded - truth, weights)[:, BORDER:-BORDER, BORDER:-BORDER]
    return 10 * torch.log10(255**2 / difference.square().mean((1, 2)))


def task(config: TrainConfig) -> SuperResolution:  # noqa: ARG001 - the trainer's interface
    """The task, for ``task: experiments.tasks.super_resolution:task``."""
    return SuperResolution()
