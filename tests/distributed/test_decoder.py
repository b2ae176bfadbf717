"""A decoder of transformers on two ranks: attention products, shared bits, recomputed blocks, weights in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import nipq
from nipq.distributed import rank, rank_seed
from nipq.distributed.fsdp import shard_
from nipq.prepare.layer_table import quantizers
from tests.distributed.ranks import Ranks

transformers = pytest.importorskip("transformers")

STEPS = 6
BUDGET = nipq.AverageBits(weights=4, activations=4)
CONFIG = nipq.Config(attention_bits=(2, 8), shared_bits=("*.q_proj", "*.k_proj", "*.v_proj"))
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def batch(seed: int) -> dict[str, Any]:
    ids = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def trained(strategy: str, recompute: bool, half: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False, tie_word_embeddings=True))
    nipq.prepare_(model, batch(0), CONFIG)
    nipq.calibrate_(model, [batch(5 + rank())])
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if strategy == "ddp":
        wrapped: Any = DistributedDataParallel(model)
    else:
        policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if half else {}
        wrapped = shard_(model, **policy)
    wrapped.train()
    torch.manual_seed(rank_seed(5))
    optimizer = torch.optim.AdamW(nipq.param_groups(model, 1e-3))
    session = nipq.QATSession(wrapped, BUDGET, STEPS, optimizer=optimizer, finetune=0.3)
    losses = []
    for step in range(STEPS):
        loss = wrapped(**batch(10 * rank() + step)).loss
        losses.append(float(loss))
        (loss + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    assert all(c.rounded <= c.target for c in nipq.costs(model, BUDGET))
    return {"losses": losses, "bits": session.bits, "alpha": {q.name: q.alpha.tolist() for q in quantizers(model)}}


@pytest.mark.parametrize(
    ("strategy", "recompute", "half"), [("ddp", False, False), ("fsdp", True, False), ("fsdp", False, True)]
)
def test_both_ranks_end_with_one_decoder(ranks: Ranks, strategy: str, recompute: bool, half: bool) -> None:
    first, second = ranks(trained, strategy, recompute, half)
    assert first["losses"] != second["losses"]  # each had sentences and noise of its own
    assert first["bits"] == second["bits"]
    assert first["alpha"] == second["alpha"]
    assert any("attention_products" in name or "scores" in name for name in first["alpha"])
    shared = {name: bits for name, bits in first["bits"].items() if name.endswith(("q_proj.weight", "k_proj.weight"))}
    assert shared[min(shared)] == shared[min(shared).replace("k_proj", "q_proj")]
