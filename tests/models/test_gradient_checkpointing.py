"""Gradient checkpointing: recomputation sees the noise that the forward saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.kernels import dispatch as backend


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    outputs = model(**batch)
    (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).square().mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def checkpoint(model: nn.Module, *, use_reentrant: bool) -> None:
    """Under the name that this release of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("plain_kernels", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention_bits", [None, (2, 8)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_gradients_are_those_without_checkpointing(
    name: str, attention_bits: Any, use_reentrant: bool, plain_kernels: bool, model_named: Any, monkeypatch: Any
) -> None:
    subject = model_named(name)
    model = nipq.prepare_(subject.build(), subject.batch, nipq.Config(attention_bits=attention_bits))
    nipq.calibrate_(model, [subject.batch]).train()
    model.config.use_cache = False  # checkpointing turns it off, and noise goes by the order of memory
    if plain_kernels:
        monkeypatch.setattr(backend, "_CPU", backend._CPU._replace(supported=lambda *_: False))
    expected = gradients(model, subject.batch)
    checkpoint(model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    found = gradients(model, subject.batch)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
