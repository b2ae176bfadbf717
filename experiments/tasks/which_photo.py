"""Task "which photo?": tell which of 71 photographs a 32x32 crop is from.

21,300 crops to train on, 4,260 to test on, 60 per class.

The left 70 % of each photograph gives training crops and the right 25 % test crops, so no pixel is shared. A network
has to recognise a scene by the colours and textures of a part of it that it never saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.cache import Arrays
from experiments.tasks.photos import cached, pixels
from nipq.train.batches import Sources, TensorSplit

if TYPE_CHECKING:
    from pathlib import Path

    from nipq.train.config import DataConfig

SIZE = 32
SHORT_SIDE = 320
#: Photographs of the list that are used; the others are too small.
PHOTOS = 76
#: Crops of a photograph to train on and to test on.
CROPS = (300, 60)
#: Parts of the width that they come from.
SIDES = ((0.0, 0.70), (0.75, 1.0))
#: Least standard deviation of a crop's pixel values; flat sky could be anywhere.
DEVIATION = 14.0
SHIFT = 4


def data(config: DataConfig, seed: int) -> Sources:
    """The splits; crops are cut on the first call and cached beside the photographs.

    Validation takes the crops from the right end of each photograph's training side, and training leaves out those that
    reach into it: what is measured there is, as in the test, a part of the scene that was not seen.

    Args:
        config: The ``data`` section; ``path`` is the folder of photographs.
        seed: Decides which training crops ``train_limit`` keeps.

    Returns:
        Train, validation and test crops, standardised with the training crops' mean and deviation.

    Raises:
        ConfigError: If photographs are missing.
    """
    recipe = (SIZE, SHORT_SIDE, PHOTOS, CROPS, SIDES, DEVIATION)
    arrays = cached(config.path, "which_photo", recipe, cut)
    images, labels, lefts = (torch.from_numpy(arrays[key]) for key in ("images", "labels", "lefts"))
    held_out, train = strips(labels, lefts, config.validation)
    if config.train_limit is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]
    mean, deviation = images.float().mean(), images.float().std()

    def split(crops: Tensor, classes: Tensor) -> TensorSplit:
        return TensorSplit(
            (crops - mean) / deviation, classes, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size,
            shift=SHIFT if config.augment else 0, flip=config.augment,
        )  # fmt: skip

    return Sources(
        train=split(images[train], labels[train]),
        validation=split(images[held_out], labels[held_out]) if len(held_out) else None,
        test=split(torch.from_numpy(arrays["test_images"]), torch.from_numpy(arrays["test_labels"])),
        classes=int(labels.max()) + 1,
    )


def strips(labels: Tensor, lefts: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Mark the crops in the right end of their photograph's training side, and those left of it.

    Args:
        labels: Photograph of each crop, [N].
        lefts: Its first column in pixels, [N].
        fraction: Of each photograph's crops that is held out.

    Returns:
        Indices of the crops that are held out, and of those that share no column with them.
    """
    held_out, train = torch.zeros(len(labels), dtype=torch.bool), torch.ones(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1) if fraction else ():
        mine = labels == label
        edge = lefts[mine].double().quantile(1 - fraction)
        held_out |= mine & (lefts >= edge)
        train &= ~mine | (lefts + SIZE <= edge)
    return held_out.nonzero()[:, 0], train.nonzero()[:, 0]


def cut(photos: list[Path]) -> Arrays:
    """Cut the crops of every photograph that has enough texture on both sides.

    Args:
        photos: The photographs.

    Returns:
        ``images`` and ``test_images`` [N, 3, 32, 32] uint8, ``labels`` and ``test_labels`` [N] int64, and the first
        column ``lefts`` of each training crop.
    """
    draw = np.random.default_rng(0)
    parts: dict[str, list[Any]] = {key: [] for key in ("images", "labels", "lefts", "test_images", "test_labels")}
    classes = 0
    for path in photos[:PHOTOS]:
        photo = pixels(path, SHORT_SIDE)
        width = photo.shape[1]
        sides = [photo[:, int(width * start) : int(width * end)] for start, end in SIDES]
        (train, lefts), (test, _) = [_crops(side, count, draw) for side, count in zip(sides, CROPS, strict=True)]
        if (len(train), len(test)) == CROPS:
            parts["images"] += train
            parts["lefts"] += lefts
            parts["labels"] += [classes] * len(train)
            parts["test_images"] += test
            parts["test_labels"] += [classes] * len(test)
            classes += 1
    return {
        key: np.stack(part).transpose(0, 3, 1, 2) if key.endswith("images") else np.array(part, np.int64)
        for key, part in parts.items()
    }


def _crops(side: np.ndarray[Any, Any], count: int, draw: np.random.Generator) -> tuple[list[Any], list[int]]:
    """Up to ``count`` textured crops and their first columns, from at most six times as many places."""
    crops: list[Any] = []
    lefts: list[int] = []
    for _ in range(6 * count):
        top, left = (int(draw.integers(0, length - SIZE + 1)) for length in side.shape[:2])
        crop = side[top : top + SIZE, left : left + SIZE]
        if crop.std() >= DEVIATION:
            crops.append(crop)
            lefts.append(left)
            if len(crops) == count:
                break
    return crops, lefts
