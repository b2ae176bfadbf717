"""Object detection: the CenterNet learns its own float answers on photographs, and is scored on composed scenes.

A scene is a landscape photograph without any object that the detector knows, with up to three cut-out photos of such
objects on it, so all boxes are exact. Nobody trains on scenes: training tiles are cut from the other photographs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from experiments.tasks.boxes import decode, mean_average_precision
from experiments.tasks.cache import Arrays
from experiments.tasks.centernet import STRIDE, WEIGHTS_HELP
from experiments.tasks.efficientnet_lite0 import DEVIATION, STAMPS_HELP, cut
from experiments.tasks.float_answers import FloatAnswers, float_section
from experiments.tasks.photos import cached, pixels
from nipq.errors import ConfigError
from nipq.train.batches import Batch, Sources, TensorSplit
from nipq.train.task import predictions

if TYPE_CHECKING:
    from nipq.train.config import DataConfig, TrainConfig

CUTOUTS = Path(__file__).with_name("coco_cutouts.txt")
#: Parts of the paths of landscapes that show nothing of COCO.
PLAIN = (
    "aitzgorri", "analogpattern", "picosdeeuropa", "Kleiber", "Blinds", "Dune", "GreenMeadow", "Storm", "Wood.",
    "ColdRipple", "DarkestHour", "/Path/", "summer_1am",
)  # fmt: skip
#: Scenes for validation and for the test; those for validation are drawn first.
SCENES = (40, 120)
#: Most objects in a scene, and the longer side of each as a share of the scene's.
OBJECTS = 3
SIDES = (0.25, 0.55)
#: Factor on the distance of the boxes, against that of the heat maps.
BOXES = 0.1


def data(config: DataConfig, seed: int) -> Sources:
    """Tiles to learn on, and scenes for validation and test; both are made on the first call and cached.

    Args:
        config: The ``data`` section; ``image_size``, a multiple of 32, is the side of tiles and scenes.
        seed: Decides which tiles ``train_limit`` keeps.

    Returns:
        Images [N, 3, S, S] uint8. Targets are ``boxes`` [N, 3, 4] and ``classes`` [N, 3], -1 for none; None for tiles.

    Raises:
        ConfigError: If photographs or cut-outs are missing, or the size does not fit.
    """
    size = config.image_size
    if size % 32:
        raise ConfigError(f"expected a multiple of 32 as data.image_size, found {size}; 384 is one")
    tiles = cached(config.path, "detection_tiles", (size, DEVIATION, PLAIN), lambda photos: cut(others(photos), size))
    recipe = (size, SCENES, OBJECTS, SIDES, PLAIN, CUTOUTS.read_bytes())
    scenes = cached(config.path, "scenes", recipe, lambda photos: compose(photos, cutouts(config.path), size))
    train = torch.from_numpy(tiles["images"])
    if config.train_limit is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]

    def split(images: Tensor, targets: dict[str, Tensor] | None, *, flip: bool = False) -> TensorSplit:
        return TensorSplit(
            images, targets, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, flip=flip
        )

    def some(which: slice) -> TensorSplit:
        found = {name: torch.from_numpy(array[which]) for name, array in scenes.items()}
        return split(found.pop("images"), found)

    return Sources(
        train=split(train, None, flip=config.augment),
        validation=some(slice(SCENES[0])) if config.validation else None,
        test=some(slice(SCENES[0], None)),
    )


def plain(photos: list[Path]) -> list[Path]:
    """The photographs that scenes are composed on."""
    return [path for path in photos if any(part in path.as_posix() for part in PLAIN)]


def others(photos: list[Path]) -> list[Path]:
    """The photographs that tiles are cut from."""
    backgrounds = plain(photos)
    return [path for path in photos if path not in backgrounds]


def cutouts(folder: str | Path | None) -> dict[int, list[Path]]:
    """The cut-outs of each COCO class.

    Args:
        folder: Where the package lies, in any subfolder.

    Returns:
        Paths by class.

    Raises:
        ConfigError: If the package or a cut-out is missing.
    """
    table = [line.split(": ") for line in CUTOUTS.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    roots = [] if folder is None else [path.parent for path in sorted(Path(folder).rglob("stamps/animals"))]
    missing = [name for name, _ in table if not roots or not (roots[0] / f"{name}.png").is_file()]
    if missing:
        raise ConfigError(f"expected {len(table)} cut-outs below {folder}, {missing[0]}.png is missing. {STAMPS_HELP}")
    found: dict[int, list[Path]] = {}
    for name, label in table:
        found.setdefault(int(label), []).append(roots[0] / f"{name}.png")
    return found


def compose(photos: list[Path], objects: dict[int, list[Path]], size: int) -> Arrays:
    """Draw all scenes, always the same.

    Args:
        photos: The photographs; only plain ones are used.
        objects: Cut-outs by class.
        size: Side of a scene.

    Returns:
        ``images`` [N, 3, size, size] uint8, ``boxes`` [N, 3, 4] float32 in pixels, and ``classes`` [N, 3] int64 with -1
        where there is no object.
    """
    draw = random.Random(0)
    backgrounds = [pixels(path, size) for path in plain(photos)]
    stamps = {label: [_visible(path) for path in paths] for label, paths in sorted(objects.items())}
    parts: dict[str, list[Any]] = {"images": [], "boxes": [], "classes": []}
    for _ in range(sum(SCENES)):
        background = draw.choice(backgrounds)
        top, left = (draw.randint(0, length - size) for length in background.shape[:2])
        scene = Image.fromarray(background[top : top + size, left : left + size]).convert("RGBA")
        boxes, classes = np.zeros((OBJECTS, 4), np.float32), np.full(OBJECTS, -1)
        for number in range(draw.randint(1, OBJECTS)):
            label = draw.choice(list(stamps))
            stamp = draw.choice(stamps[label])
            scale = draw.uniform(*SIDES) * size / max(stamp.size)
            stamp = stamp.resize((max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))))
            for _ in range(20):  # tries for a place beside the others
                x, y = draw.randint(0, size - stamp.width), draw.randint(0, size - stamp.height)
                box = np.array([x, y, x + stamp.width, y + stamp.height])
                taken = boxes[:number]
                if not ((box[:2] < taken[:, 2:]) & (taken[:, :2] < box[2:])).all(1).any():
                    scene.alpha_composite(stamp, (x, y))
                    boxes[number], classes[number] = box, label
                    break
        parts["images"].append(np.asarray(scene.convert("RGB")).transpose(2, 0, 1))
        parts["boxes"].append(boxes)
        parts["classes"].append(classes)
    return {name: np.stack(part) for name, part in parts.items()}


def _visible(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())


Maps = tuple[Tensor, Tensor]
"""Logits of the heat map, and distances to the sides of boxes; see :class:`experiments.tasks.centernet.CenterNet`."""


class Detection(FloatAnswers):
    """Distance from the float network's maps; mean average precision at an overlap of one half."""

    metric = "mAP50"
    unit = "%"
    higher_is_better = True

    def distillation(self, outputs: Maps, teacher_outputs: Maps) -> Tensor:
        """See :func:`distance`."""
        return distance(outputs, teacher_outputs)

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean distance from the float network, and mAP50 over all scenes in per cent."""
        batches = list(batches)
        tensor = next(model.parameters(), torch.empty(0))
        originals = predictions(self.original().to(tensor.device), batches)
        loss, found, truth = 0.0, [], []
        for (outputs, targets), (answers, _) in zip(predictions(model, batches), originals, strict=True):
            heat, distances = (each.float() for each in outputs)
            loss += float(distance((heat, distances), answers)) * len(heat)
            found += [type(each)(*(part.cpu() for part in each)) for each in decode(heat, distances, STRIDE)]
            for boxes, classes in zip(targets["boxes"].cpu(), targets["classes"].cpu(), strict=True):
                truth.append((boxes[classes >= 0], classes[classes >= 0]))
        return {"loss": loss / len(truth), "mAP50": 100 * mean_average_precision(found, truth), "count": len(truth)}


def distance(outputs: Maps, answers: Maps) -> Tensor:
    """Distance of maps from those of the float network, where that sees objects.

    With the float network's heat ``p`` and ``w`` its largest over the classes::

        sum KL(p || sigmoid(outputs)) / sum p + 0.1 sum w |difference of distances| / (4 strides * sum w)

    Args:
        outputs: Logits [N, C, H, W] and distances [N, 4, H, W].
        answers: The same of the float network.

    Returns:
        Shape ().
    """
    (heat, sides), (true_heat, true_sides) = outputs, answers
    p = true_heat.sigmoid()
    divergence = p * (logsigmoid(true_heat) - logsigmoid(heat)) + (1 - p) * (logsigmoid(-true_heat) - logsigmoid(-heat))
    w = p.amax(1, keepdim=True)
    apart = (w * (sides - true_sides).abs()).sum() / (4 * STRIDE * w.sum())
    return divergence.sum() / p.sum() + BOXES * apart


def task(config: TrainConfig) -> Detection:
    """The task; the teacher, or without one the start, is the float network whose maps are learned.

    Args:
        config: The run's config.

    Returns:
        The task.

    Raises:
        ConfigError: If neither section names weights.
    """
    return Detection(float_section(config, "centernet", WEIGHTS_HELP))
