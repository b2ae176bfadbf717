"""Movie snippets read by MiniLM: is one praise or blame, and how good or bad did its readers find it?

    python -m experiments.tasks.minilm FOLDER runs/minilm_sentiment/runs/published.safetensors

writes the published sentence encoder, which FOLDER holds, for ``model.weights``. All linear layers and what they read
are quantized; embeddings, layer norms and the products of attention stay float, see
:func:`nipq.prepare.validate.validate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from experiments.tasks.snippets import MODEL, MODEL_HELP
from experiments.tasks.weights import write_weights
from nipq.errors import ConfigError, require
from nipq.train.batches import Batch
from nipq.train.factory import read_state
from nipq.train.task import Task, predictions

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

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
        self.register_load_state_dict_pre_hook(_keep_head)  # type: ignore[no-untyped-call]  # torch

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
    _, place, count = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]  # torch
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
    name = f"{MODEL}/model.safetensors"
    write_weights(__doc__, name, MODEL_HELP, lambda path: renamed(read_state(path), network()))


if __name__ == "__main__":
    main()
