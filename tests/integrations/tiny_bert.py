"""A tiny BERT with sentences to learn, and a Trainer for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nipq.budget.budget import AverageBits, costs
from nipq.prepare.layer_table import quantizers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


BUDGET = AverageBits(weights=4, activations=4)
SAMPLES = 48


def data() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (SAMPLES, 6), generator=random)
    return [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.int64), "labels": int(row[0]) % 2} for row in ids
    ]


def bert() -> nn.Module:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes)
    return transformers.BertForSequenceClassification(config)


def make_trainer(
    folder: Path,
    model: nn.Module | None = None,
    kind: type[Any] = transformers.Trainer,
    *,
    given: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8, "num_train_epochs": 4,
        "learning_rate": 1e-3, "weight_decay": 0.01, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 6,
    }  # fmt: skip
    training = transformers.TrainingArguments(**settings | arguments)
    return kind(bert() if model is None else model, training, train_dataset=data(), eval_dataset=data(), **given or {})


def keeps(model: nn.Module) -> bool:
    return all(q.is_frozen for q in quantizers(model)) and all(c.rounded <= c.target for c in costs(model, BUDGET))
