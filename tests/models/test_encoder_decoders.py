"""Models that make their decoder's inputs of the labels, on their usual training batches: T5, BART, Whisper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nipq
from nipq.budget.distance import floats_in
from nipq.errors import ConfigError
from nipq.prepare.input_form import known_form
from nipq.qat.session import is_calibrated

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS[:, :5].flip(1)
SMALL = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def t5() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, use_cache=False, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, max_position_embeddings=16))


def whisper() -> nn.Module:
    sizes = {"max_source_positions": 10, "max_target_positions": 8, "num_mel_bins": 8}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SMALL, **sizes))


def batch(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """As a collator gives it, with a key that the model does not know."""
    if build is whisper:
        return {"input_features": torch.randn(4, 8, 20), "labels": LABELS, "path": ["a", "b", "c", "d"]}
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS, "image_id": [1, 2, 3, 4]}


MODELS = [t5, bart, whisper]


@pytest.mark.parametrize("build", MODELS)
def test_from_training_batches_to_a_proven_file(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = build(), batch(build)
    example = {key: value[:1] for key, value in given.items() if isinstance(value, torch.Tensor)}
    nipq.prepare_(model, example)
    optimizer = torch.optim.AdamW(nipq.param_groups(model), lr=1e-3)
    budget = nipq.AverageBits(weights=6, activations=6)
    session = nipq.QATSession(model, budget, 2, loader=[given], optimizer=optimizer)
    model.train()
    for _ in range(2):
        (model(**{key: given[key] for key in example}).loss + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    deployed = nipq.convert(model)
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    result = nipq.verify(model, deployed, [given], file=path)
    assert result, str(result)
    assert result.checks[2].numbers["samples"] == 4
    loaded = nipq.load(path, build())
    with torch.no_grad():
        inputs = {key: given[key] for key in example}
        assert torch.equal(loaded(**inputs).logits, deployed(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("build", MODELS)
def test_programs_are_written_and_proven_with_training_batches(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = build(), batch(build)
    nipq.prepare_(model, {key: value for key, value in given.items() if isinstance(value, torch.Tensor)})
    nipq.calibrate_(model, [given])
    nipq.freeze_bits_(model)
    deployed = nipq.convert(model.eval())
    nipq.export(deployed, tmp_path / "model.pt2", given)
    result = nipq.verify(model, tmp_path / "model.pt2", loader=[given])
    assert result, str(result)


def test_the_loss_that_labels_add_to_the_outputs_changes_no_bits() -> None:
    model, given = t5(), batch(t5)
    inputs = {key: value for key, value in given.items() if key != "image_id"}
    outputs = model.eval()(**inputs)
    assert outputs.loss.ndim == 0
    assert not any(tensor is outputs.loss for tensor in floats_in(outputs))
    assert floats_in({"loss": outputs.loss}) == [outputs.loss]


def test_a_classifier_keeps_its_labels_out_or_in_as_the_example_did() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, 0] % 2, "image_id": [0] * 4}
    for keys in (["input_ids", "attention_mask"], ["input_ids", "attention_mask", "labels"]):
        model = transformers.BertForSequenceClassification(config)
        nipq.prepare_(model, {key: given[key] for key in keys})
        nipq.calibrate_(model, [transformers.BatchEncoding(given)])
        assert is_calibrated(model)
        form = known_form(model)
        assert form is not None
        assert list(form.inputs(given)) == keys
    with pytest.raises(ConfigError, match=r"batch 0: .*found dict of 'input_ids', without 'attention_mask'"):
        nipq.calibrate_(model, [{"input_ids": IDS}])


def test_post_training_quantization_keeps_the_labels_that_a_decoder_needs() -> None:
    torch.manual_seed(0)
    result = nipq.quantize(t5(), [batch(t5)] * 2, nipq.AverageBits(weights=6))
    assert list(result.example_inputs) == ["input_ids", "attention_mask", "labels"]
    assert result.verify([batch(t5)])
