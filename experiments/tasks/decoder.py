"""A small decoder in the manner of Llama that reads characters, and bits per character as its score."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from experiments.tasks.novels import LENGTH, VOCABULARY
from nipq.errors import require
from nipq.train.batches import Batch
from nipq.train.task import Task, predictions

if TYPE_CHECKING:
    from nipq.train.config import TrainConfig

SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 352,
}  # fmt: skip


class CharacterDecoder(nn.Module):
    """A decoder that answers with scores alone, so that any training loop can use them.

    Args:
        decoder: A causal model of the transformers library.
    """

    def __init__(self, decoder: nn.Module) -> None:
        """Keep the decoder."""
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map characters [N, L] to the scores of each one's successor [N, L, V]."""
        scores: Tensor = self.decoder(input_ids=input_ids, use_cache=False).logits
        return scores


def llama(**sizes: int | float) -> CharacterDecoder:
    """The decoder, untrained: 820 thousand weights.

    Args:
        sizes: Other settings of transformers' ``LlamaConfig``.

    Raises:
        MissingDependencyError: If transformers is not installed.
    """
    transformers = require("transformers", extra="tasks", purpose="the decoder")
    config = transformers.LlamaConfig(**SIZES | sizes, attn_implementation="sdpa")
    return CharacterDecoder(transformers.LlamaForCausalLM(config))


class NextCharacter(Task):
    """Cross entropy of the next character; models are compared by its mean in bits."""

    metric = "bits_per_character"
    unit = "bit"
    higher_is_better = False

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of scores [N, L, V] and characters [N, L]."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Mean divergence from the teacher's distributions, in nats."""
        ours, theirs = log_softmax(outputs.flatten(0, 1), -1), log_softmax(teacher_outputs.flatten(0, 1), -1)
        return kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean cross entropy in nats and in bits, and the share of characters that were the first guess, in %."""
        total, right, count = 0.0, 0, 0
        for outputs, targets in predictions(model, batches):
            total += float(self.loss(outputs.float(), targets)) * targets.numel()
            right += int((outputs.argmax(-1) == targets).sum())
            count += targets.numel()
        nats = total / count
        return {"loss": nats, "bits_per_character": nats / math.log(2), "accuracy": 100 * right / count, "count": count}


def next_character_task(config: TrainConfig) -> NextCharacter:  # noqa: ARG001 - the trainer's interface
    """The task, for ``task: experiments.tasks.decoder:next_character_task``."""
    return NextCharacter()


def guess_without_reading(characters: Tensor) -> float:
    """Bits per character of a guesser that knows frequencies alone: what no model should need.

    Args:
        characters: Any shape, int64.
    """
    shares = torch.bincount(characters.flatten()).double() / characters.numel()
    return float(-(shares * shares.clamp(min=1e-300).log2()).sum())
