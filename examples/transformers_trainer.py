"""transformers' Trainer: one call before ``train``. A tiny BERT tells whether most tokens of a sequence are small.

python examples/transformers_trainer.py        # pip install "nipq[hf]"
"""

from __future__ import annotations

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import nipq
from nipq.integrations.transformers import quantize

TOKENS, LENGTH = 40, 9


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor | int]]:
    """Random sequences, with the answer."""
    ids = torch.randint(0, TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int((row < TOKENS // 2).sum() > LENGTH // 2)} for row in ids]


def accuracy(prediction: tuple[object, object]) -> dict[str, float]:
    """For ``Trainer``."""
    answers, labels = prediction
    return {"accuracy": float((answers.argmax(-1) == labels).mean())}


def trainer_for(model: BertForSequenceClassification, epochs: int, lr: float) -> Trainer:
    """As always."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=64, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=40, disable_tqdm=True,
    )  # fmt: skip
    train, test = sentences(2000, seed=1), sentences(500, seed=2)
    return Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)


torch.manual_seed(0)
sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
model = BertForSequenceClassification(BertConfig(vocab_size=TOKENS, max_position_embeddings=16, **sizes))
trainer = trainer_for(model, epochs=3, lr=2e-3)
trainer.train()
print("float:", trainer.evaluate()["eval_accuracy"])

trainer = trainer_for(model, epochs=3, lr=5e-4)
callback = quantize(trainer, nipq.AverageBits(weights=4, activations=4))
trainer.train()
print("quantized:", trainer.evaluate()["eval_accuracy"], callback.session.logs())
