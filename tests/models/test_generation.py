"""Generation with a cache of keys and values gives the tokens that generation without one gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nipq
from nipq.prepare.layer_table import set_bits_, set_phase_


@pytest.mark.parametrize("attention_bits", [None, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_changes_no_token(name: str, attention_bits: int | None, model_named: Any) -> None:
    subject = model_named(name)
    model = nipq.prepare_(subject.build(), subject.batch, nipq.Config(attention_bits=attention_bits))
    nipq.calibrate_(model, [subject.batch])
    set_bits_(model, 4)
    prompt = subject.batch["input_ids"][:2, :3] + 1
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(prompt)
    set_phase_(model, "round")
    for generator in (model.eval(), nipq.convert(model)):
        with torch.no_grad():
            cached, plain = (generator.generate(prompt, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, plain)
        assert cached.shape[1] == 15
